from __future__ import annotations

import hashlib
import multiprocessing
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from relic.data import WorldDataModule
from relic.data.index import Index, write_index
from relic.data.loader import GRACE
from relic.data.sampling import split_scenes
from relic.data.schema import C2W, LATENTS, TEXT, VIDEO, dump_array
from relic.data.select import split_rows
from relic.data.shards import read_clip, unpack_sample
from relic.ops.actions import encode_actions
from relic.ops.randomness import derive_seed
from relic.ops.words import word_ids
from relic.types import Batch, ClipSpec
from tests.data.recordings import clip_sample, latents_sample, smooth_path, write_dataset

SPEC = ClipSpec(height=64, width=64, horizons=(33,), block_latents=4)


def data_module(root: Path, **settings: Any) -> WorldDataModule:
    defaults: dict[str, Any] = {
        "clip": SPEC, "global_batch": 4, "batches_per_epoch": 3, "workers": 0, "validation_scenes": 1,
        "evaluation_scenes": 1, "validation_windows": 6,
    }  # fmt: skip
    return WorldDataModule(root=str(root), **(defaults | settings))


def training(root: Path, *, rank: int = 0, world_size: int = 1, **settings: Any) -> list[Batch]:
    data = data_module(root, **settings)
    if world_size > 1:
        data._share = lambda size: range(rank, size, world_size)  # type: ignore[method-assign]
    data.setup("fit")
    return list(data.train_dataloader())


def same(one: Batch, other: Batch) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def test_a_batch_of_video_has_the_shapes_of_the_contract(walks: Path) -> None:
    batch = training(walks, words=7)[0]
    assert batch.latents is None and batch.trajectory is None and batch.video is not None
    assert (batch.video.shape, batch.video.dtype) == ((4, 33, 3, 64, 64), torch.uint8)
    assert (batch.actions.shape, batch.actions.dtype) == ((4, 33, 13), torch.float32)
    assert (batch.text.shape, batch.text.dtype) == ((4, 7), torch.int64)
    assert (batch.d_bar.dtype, batch.key.dtype) == (torch.float64, torch.int64)
    assert batch.key.tolist() == [derive_seed(0, "train", 0, place) for place in range(4)]


def test_a_window_is_a_part_of_its_recording(walks: Path) -> None:
    data = data_module(walks)
    data.setup("fit")
    loader = data.train_dataloader()
    plan = loader._loader.dataset.plan  # type: ignore[attr-defined]
    batch = next(iter(loader))
    for place in range(4):
        window = plan.draw(0, place, attempt=0)
        clip = read_clip(walks / window.row.shard, window.row.key)
        part = slice(window.start, window.start + 33)
        assert torch.equal(batch.video[place].permute(0, 2, 3, 1), clip.video[part])
        assert torch.equal(batch.actions[place], encode_actions(clip.c2w[part], d_bar=clip.d_bar).float())
        assert batch.d_bar[place] == clip.d_bar
        caption = clip.captions[window.start >= 80]
        assert torch.equal(batch.text[place], word_ids(caption))


def test_palindromes_come_back(walks: Path) -> None:
    for batch in training(walks, palindromes=1.0):
        assert batch.video is not None
        ends = [
            next(f for f in range(16, 33) if torch.equal(v[f - 1], v[(f + 1) % 33]) or f == 32)
            for v in batch.video
        ]
        for video, end in zip(batch.video, ends, strict=True):
            back = 32 - end
            assert torch.equal(video[end - back : end], video[end + 1 :].flip(0))
        assert min(ends) < 32


def test_no_training_window_shows_a_held_out_scene(walks: Path) -> None:
    data = data_module(walks, validation_scenes=2, evaluation_scenes=1)
    scenes = {}
    for stage in ("fit", "test"):
        data.setup(stage)
        scenes |= {split: {row.scene for row in rows} for split, rows in data._rows.items()}
    assert {split: len(names) for split, names in scenes.items()} == {
        "train": 3,
        "validation": 2,
        "evaluation": 1,
    }
    assert not scenes["train"] & scenes["validation"] and not scenes["train"] & scenes["evaluation"]


@pytest.mark.parametrize("palindromes", [0.0, 0.5])
def test_two_ranks_read_what_one_reads(walks: Path, palindromes: float) -> None:
    whole = training(walks, palindromes=palindromes)
    ranks = [training(walks, palindromes=palindromes, rank=rank, world_size=2) for rank in (0, 1)]
    for one, first, second in zip(whole, *ranks, strict=True):
        for a, b, c in zip(one, first, second, strict=True):
            if a is not None:
                assert torch.equal(a[0::2], b) and torch.equal(a[1::2], c)


def test_workers_change_nothing(walks: Path) -> None:
    pairs = zip(training(walks, palindromes=0.5), training(walks, palindromes=0.5, workers=2), strict=True)
    assert all(same(one, other) for one, other in pairs)


def test_reading_processes_end_with_the_run_in_the_middle_of_an_epoch(walks: Path) -> None:
    data = data_module(walks, workers=2)
    data.setup("fit")
    before = multiprocessing.active_children()
    batches = iter(data.train_dataloader())
    next(batches)
    readers = [each for each in multiprocessing.active_children() if each not in before]
    assert len(readers) == 2
    start = time.monotonic()
    data.teardown("fit")
    assert time.monotonic() - start < 4.0  # what waiting for one of them may take
    assert not any(reader.is_alive() for reader in readers)


def test_the_global_generator_is_left_alone(walks: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    training(walks)
    assert torch.rand(()) == expected


def test_epochs_run_on_and_seeds_differ(walks: Path) -> None:
    data = data_module(walks)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = [batch.key.tolist() for _ in range(2) for batch in loader]
    assert len(loader) == 3
    assert epochs == [[derive_seed(0, "train", b, place) for place in range(4)] for b in range(6)]
    assert not same(training(walks, seed=1)[0], training(walks)[0])


def test_validation_is_always_the_same(walks: Path) -> None:
    data = data_module(walks, palindromes=0.5)
    data.setup("fit")
    loader = data.val_dataloader()
    first, again = list(loader), list(loader)
    assert [len(batch.key) for batch in first] == [4, 2]
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    data.setup("test")
    assert not same(next(iter(data.test_dataloader())), first[0])


def test_no_validation_scenes_means_no_validation(walks: Path) -> None:
    data = data_module(walks, validation_scenes=0)
    data.setup("fit")
    assert data.val_dataloader() == []


def test_a_stride_multiplies_d_bar_and_sizes_scale(walks: Path) -> None:
    spec = ClipSpec(height=32, width=32, fps=8, horizons=(33,))
    data = data_module(walks, clip=spec)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.video is not None and batch.video.shape == (4, 33, 3, 32, 32)
    assert set(batch.d_bar.tolist()) <= {2 * row.d_bar for row in Index.open(walks).rows}
    assert 0.7 < batch.actions[:, 1:, :6].norm(dim=-1).mean() < 1.3, "labels stay near one d_bar a frame"


# latents and trajectories


def test_latents_are_read_and_prefixes_taken(encoded: Path) -> None:
    whole = training(encoded, content="latents")[0]
    assert whole.latents is not None and whole.video is None
    assert (whole.latents.shape, whole.actions.shape) == ((4, 9, 4, 8, 8), (4, 33, 13))
    short = ClipSpec(height=64, width=64, horizons=(17,))
    prefix = training(encoded, content="latents", clip=short, balance=0)[0]
    same_windows = training(encoded, content="latents", balance=0)[0]
    assert prefix.latents is not None and same_windows.latents is not None
    assert torch.equal(prefix.latents, same_windows.latents[:, :5])
    assert torch.equal(prefix.actions, same_windows.actions[:, :17])


def test_trajectories_are_read(tmp_path: Path) -> None:
    samples = [(f"walk{i}", latents_sample(33, seed=i, scene=f"scene{i}", states=5)) for i in range(3)]
    batch = training(
        write_dataset(tmp_path, samples),
        content="trajectory",
        clip=ClipSpec(height=64, width=64, horizons=(17,)),
    )[0]
    assert batch.trajectory is not None and batch.trajectory.shape == (4, 5, 5, 4, 8, 8)


def test_latents_of_another_vae_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "vae.safetensors"
    weights.write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()
    for name, found in (("right", right), ("wrong", "f" * 64)):
        samples = [(f"walk{i}", latents_sample(33, scene=f"scene{i}", vae_sha256=found)) for i in range(3)]
        write_dataset(tmp_path / name, samples)
    assert training(tmp_path / "right", content="latents", vae=str(weights))
    with pytest.raises(ValueError, match=f"{'f' * 64}.*{right}"):
        training(tmp_path / "wrong", content="latents", vae=str(weights))
    with pytest.raises(FileNotFoundError, match="no such file"):
        training(tmp_path / "right", content="latents", vae=str(tmp_path / "none"))


# what is refused before time is spent


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"palindromes": 0.5, "content": "latents"}, "cannot be turned back"),
        ({"palindromes": 1.5}, r"palindromes=1.5 must be in \[0, 1\]"),
        ({"balance": -1}, "balance=-1"),
        ({"max_corrupt": 2}, "max_corrupt=2"),
        ({"global_batch": 0}, "global_batch=0"),
        ({"content": "pixels"}, "content='pixels'"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_module(Path("nowhere"), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"content": "latents"}, "no usable latents.npy.*relic encode.*mp4"),
        ({"content": "trajectory"}, "no usable trajectory.npy"),
        (
            {"validation_scenes": 4, "evaluation_scenes": 2},
            "no samples are left for train: the dataset has 6",
        ),
        ({"evaluation_scenes": 6}, "no samples are left for"),
        ({"clip": ClipSpec(height=64, width=64, horizons=(161,))}, "161 frames is longer .* 145 at 16 fps"),
        ({"clip": ClipSpec(height=64, width=96, horizons=(33,))}, "is 64x64, the clip asked for is 64x96"),
        (
            {"clip": ClipSpec(height=128, width=128, horizons=(33,))},
            "is 64x64, the clip asked for is 128x128",
        ),
        ({"clip": ClipSpec(height=64, width=64, fps=12, horizons=(33,))}, "walk0 in .*16 fps .* at 12"),
    ],
)
def test_what_does_not_fit_the_recordings_is_refused_in_setup(
    walks: Path, settings: dict[str, Any], message: str
) -> None:
    data = data_module(walks, **settings)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ClipSpec(height=64, width=64, horizons=(49,)), "49 frames is longer .* 33 at"),
        (ClipSpec(height=32, width=32, horizons=(33,)), "encoded from 64x64 .* 32x32"),
        (ClipSpec(height=64, width=64, fps=8, horizons=(17,)), "encoded from 64x64 at 16 fps"),
    ],
)
def test_what_does_not_fit_the_latents_is_refused_in_setup(
    encoded: Path, spec: ClipSpec, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        training(encoded, content="latents", clip=spec)


def test_a_missing_dataset_is_refused_in_setup(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        training(tmp_path / "nowhere")


def test_unequal_shares_of_ranks_are_refused(walks: Path) -> None:
    data = data_module(walks, global_batch=6)
    connector = SimpleNamespace(use_distributed_sampler=False)
    ranks = {"rank": 0, "num_replicas": 4}
    data.trainer = SimpleNamespace(
        _accelerator_connector=connector, distributed_sampler_kwargs=ranks, accumulate_grad_batches=1
    )  # type: ignore[assignment]
    with pytest.raises(ValueError, match="batch of 6 cannot be shared by 4 ranks"):
        data.setup("fit")


# what is damaged


def with_bad_video(sample: dict[str, bytes]) -> dict[str, bytes]:
    """Damage the coded frames but not the header, so that only decoding finds out."""
    video = bytearray(sample[VIDEO])
    video[100 : len(video) // 2] = bytes(len(video) // 2 - 100)
    return sample | {VIDEO: bytes(video)}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight recordings of which one cannot be decoded."""
    samples = [(f"walk{i}", clip_sample(49, seed=i, scene=f"scene{i}")) for i in range(8)]
    samples[3] = ("walk3", with_bad_video(samples[3][1]))
    with pytest.raises(ValueError, match=r"readable|damaged"):
        unpack_sample(samples[3][1])
    return write_dataset(tmp_path_factory.mktemp("damaged"), samples)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_windows_are_replaced_named_and_counted(damaged: Path, workers: int) -> None:
    data = data_module(
        damaged,
        max_corrupt=1.0,
        batches_per_epoch=10,
        workers=workers,
        evaluation_scenes=0,
        validation_scenes=0,
    )
    data.setup("fit")
    loader = data.train_dataloader()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keys = [key for batch in loader for key in batch.key.tolist()]
    named = [str(warning.message) for warning in caught if "skipped" in str(warning.message)]
    assert keys == [derive_seed(0, "train", b, place) for b in range(10) for place in range(4)]
    assert len(named) == 1 and "walk3 in shards/00001.tar" in named[0]
    assert loader.corrupt >= 1 and loader.drawn == 40 + loader.corrupt


def test_too_many_unreadable_windows_fail_the_run(damaged: Path) -> None:
    with (
        pytest.warns(UserWarning, match="skipped walk3"),
        pytest.raises(RuntimeError, match=r"max_corrupt=0\.01: walk3"),
    ):
        training(
            damaged, max_corrupt=0.01, batches_per_epoch=GRACE // 4, evaluation_scenes=0, validation_scenes=0
        )


def test_a_dataset_that_went_bad_after_indexing_fails_the_run(tmp_path: Path) -> None:
    samples = [(f"walk{i}", latents_sample(33, seed=i, scene=f"scene{i}")) for i in range(3)]
    for _, sample in samples:
        sample[LATENTS] = dump_array(np.full((9, 4, 8, 8), np.nan, np.float16))
    with pytest.raises(RuntimeError, match=r"8 windows in a row .*NaN"):
        training(write_dataset(tmp_path, samples), content="latents")


def test_invalid_samples_are_left_out_and_told(tmp_path: Path) -> None:
    samples = [(f"walk{i}", clip_sample(33, seed=i, scene=f"scene{i}")) for i in range(4)]
    bad = smooth_path(33, seed=0).numpy()
    bad[7] = np.nan
    samples[1][1][C2W] = dump_array(bad)
    write_dataset(tmp_path, samples)
    data = data_module(tmp_path)
    with pytest.warns(
        UserWarning, match=r"1 of 4 samples are invalid and left out: walk1 in shards/00000\.tar: .*NaN"
    ):
        data.setup("fit")
    assert "walk1" not in {row.key for rows in data._rows.values() for row in rows}


def test_embedded_prompts_are_read_and_padded_instead_of_words(tmp_path: Path) -> None:
    samples = []
    for i in range(8):
        prompt = np.full((3 + i % 2, 5), 1 + i, np.float16)
        sample = latents_sample(33, seed=i, scene=f"room{i % 4}") | {TEXT: dump_array(prompt)}
        samples.append((f"s{i}", sample))
    everything = {"content": "latents", "validation_scenes": 0, "evaluation_scenes": 0, "balance": 0}
    for batch in training(write_dataset(tmp_path / "all", samples), **everything):
        assert batch.text.dtype == torch.float32 and batch.text.shape[::2] == (4, 5)
        rows = (batch.text != 0).any(-1).sum(1)
        assert torch.equal(rows, 3 + (batch.text[:, 0, 0].long() - 1) % 2)
    mixed = write_dataset(tmp_path / "mixed", [*samples[:1], ("plain", latents_sample(33, scene="room0"))])
    with pytest.raises(ValueError, match="embed them all"):
        training(mixed, **everything, batches_per_epoch=8)


def test_latents_hold_out_the_scenes_that_their_recordings_do(tmp_path: Path) -> None:
    """Also where a scene is too short for a horizon and left no latents."""
    scenes = [f"room{i}" for i in range(8)]
    held = split_scenes(scenes, validation_scenes=2, evaluation_scenes=2)
    for lost in scenes[:4]:
        left = [scene for scene in scenes if scene != lost]
        samples = [(s, latents_sample(33, seed=i, scene=s)) for i, s in enumerate(left)]
        write_index(write_dataset(tmp_path / lost, samples, index=False), scenes=scenes)
        index = Index.open(tmp_path / lost)
        for split in ("train", "validation", "evaluation"):
            rows = split_rows(
                index.rows, scenes=index.scenes, split=split, validation_scenes=2, evaluation_scenes=2
            )
            assert {row.scene for row in rows} == {scene for scene in left if held[scene] == split}
