"""Encoding a dataset: windows and palindromes are cut before the VAE sees them, and a stopped run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import reduce
from torch import Tensor

from relic.data.augment import palindrome_indices
from relic.data.encode import EncodeSettings, encode_dataset, plan_encoding
from relic.data.index import Index, Row
from relic.data.reader import WindowReader
from relic.data.schema import ACTIONS, JSON, LATENTS, LATENTS_SCHEMA, load_array, load_json
from relic.data.shards import read_clip
from relic.data.storage import Storage
from relic.nn.checkpoints import file_sha256, save_weights
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig
from relic.ops.actions import encode_actions, integrate, mirror_actions
from relic.types import ClipSpec
from relic.verbs.encode import encode as encode_verb
from tests.data.recordings import clip_sample, write_dataset

SHA = "ab" * 32


def settings(**changes) -> EncodeSettings:
    return EncodeSettings(**{"horizons": (33,), "vae_sha256": SHA, **changes})


def pool(video: Tensor) -> Tensor:
    """A VAE of a kind: every fourth frame from the first, mean over 8x8 pixels, in thousandths."""
    return reduce(video[:, ::4].float() / 1000, "b t c (h i) (w j) -> b t c h w", "mean", i=8, j=8)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    samples = [(f"walk{i}", clip_sample(65, seed=i, scene=f"scene{i}")) for i in range(4)]
    return write_dataset(tmp_path_factory.mktemp("recordings"), samples)


@pytest.fixture(scope="module")
def encoded(recordings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("latents")
    encode_dataset(recordings, out, encode=pool, settings=settings(palindromes=0.6))
    return out


def members(root: Path, row: Row) -> dict[str, bytes]:
    storage = Storage(root)
    return {
        name: storage.read(row.shard, offset=offset, length=length)
        for name, (offset, length) in row.ranges.items()
    }


def contents(root: Path) -> dict[str, bytes]:
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith(".lock"))
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def test_every_second_of_every_scene_gets_a_window(recordings, encoded):
    rows = Index.open(encoded).rows
    assert {(row.source, row.start) for row in rows} == {
        (f"walk{i}", 16 * s) for i in range(4) for s in range(3)
    }
    assert all(row.valid and row.num_frames == 33 and row.vae_sha256 == SHA for row in rows)
    assert {row.scene for row in rows} == {f"scene{i}" for i in range(4)}


def test_samples_hold_the_frames_actions_and_description_of_their_window(recordings, encoded):
    sources = {row.key: row for row in Index.open(recordings).rows}
    for row in Index.open(encoded).rows[::4]:
        held = members(encoded, row)
        clip = read_clip(recordings / sources[row.source].shard, row.source)
        order = torch.arange(33) if row.pivot is None else palindrome_indices(33, row.pivot)
        frames = clip.video[row.start + order]
        expected = pool(frames.permute(0, 3, 1, 2)[None])[0]
        latents = torch.from_numpy(load_array(held[LATENTS]))
        assert latents.dtype == torch.float16 and latents.shape == (9, 3, 8, 8)
        torch.testing.assert_close(latents.float(), expected, atol=1e-3, rtol=0)
        actions = torch.from_numpy(load_array(held[ACTIONS]))
        assert actions.dtype == torch.float32
        poses = clip.c2w[row.start + order]
        torch.testing.assert_close(actions, encode_actions(poses, d_bar=clip.d_bar).float())
        description = load_json(held[JSON], schema=LATENTS_SCHEMA)
        assert description["d_bar"] == clip.d_bar and description["caption"] == clip.captions[0]


def test_palindromes_are_turned_before_encoding_and_come_back_by_mirrored_actions(encoded):
    turned = [row for row in Index.open(encoded).rows if row.pivot is not None]
    assert 0 < len(turned) < 12
    for row in turned:
        actions = torch.from_numpy(load_array(members(encoded, row)[ACTIONS]))
        way_back = row.num_frames - row.pivot
        there = actions[row.pivot - way_back : row.pivot].flip(0)
        torch.testing.assert_close(
            actions[row.pivot :, 6:12].sum(1), mirror_actions(there)[:, 6:12].sum(1), atol=1e-4, rtol=0
        )
        path = integrate(actions)  # closes on itself
        torch.testing.assert_close(
            path[row.pivot :], path[row.pivot - 1 - way_back : row.pivot - 1].flip(0), atol=1e-4, rtol=0
        )


def test_a_pivot_depends_on_the_window_alone(recordings, encoded):
    plan = plan_encoding(Index.open(recordings), settings(palindromes=0.6, stride_seconds=2.0))
    sparse = {(w.row.key, w.start): w.pivot for task in plan for w in task.windows}
    dense = {(row.source, row.start): row.pivot for row in Index.open(encoded).rows}
    assert sparse == {place: dense[place] for place in sparse} and len(sparse) == 8


def test_each_horizon_has_its_own_shards(recordings, tmp_path):
    encode_dataset(recordings, tmp_path, encode=pool, settings=settings(horizons=(33, 17)), batch=3)
    names = sorted(p.name for p in (tmp_path / "shards").iterdir())
    assert names == ["00000-017f.tar", "00000-033f.tar", "00001-017f.tar", "00001-033f.tar"]
    assert {row.num_frames for row in Index.open(tmp_path).rows} == {17, 33}


def test_parts_share_the_work_and_the_last_one_writes_the_index(recordings, encoded, tmp_path):
    arguments = {"encode": pool, "settings": settings(palindromes=0.6)}
    assert encode_dataset(recordings, tmp_path, part=(1, 2), **arguments) is None
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["00001-033f.tar"]
    assert encode_dataset(recordings, tmp_path, part=(0, 2), **arguments) == tmp_path / "index.parquet"
    assert contents(tmp_path) == contents(encoded)
    for part, message in (((2, 2), "part=2 2 must be one of 2 parts"), ((0, 0), "part=0 0 must be")):
        with pytest.raises(ValueError, match=message):
            encode_dataset(recordings, tmp_path, part=part, **arguments)


def test_parts_do_not_wait_for_a_shard_that_cannot_be_read(recordings, tmp_path, monkeypatch):
    read = WindowReader.video

    def broken(self, window):
        if window.row.key in ("walk0", "walk1"):
            raise ValueError("cut short")
        return read(self, window)

    monkeypatch.setattr(WindowReader, "video", broken)
    arguments = {"encode": pool, "settings": settings(), "max_corrupt": 1.0}
    sources = {row.key: row.shard for row in Index.open(recordings).rows}
    assert sources["walk0"] == sources["walk1"] != sources["walk2"]
    with pytest.warns(UserWarning, match="unreadable and left out"):
        assert encode_dataset(recordings, tmp_path, part=(0, 2), **arguments) is None
    assert encode_dataset(recordings, tmp_path, part=(1, 2), **arguments) == tmp_path / "index.parquet"
    assert {row.source for row in Index.open(tmp_path).rows} == {"walk2", "walk3"}
    monkeypatch.undo()
    encode_dataset(recordings, tmp_path, **arguments)  # it is tried again
    assert {row.source for row in Index.open(tmp_path).rows} == {"walk0", "walk1", "walk2", "walk3"}


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("calls", [0, 1, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_bytes(recordings, encoded, tmp_path, calls):
    left = iter(range(calls))

    def failing(video: Tensor) -> Tensor:
        if next(left, None) is None:
            raise Stopped
        return pool(video)

    arguments = {"settings": settings(palindromes=0.6), "batch": 3}
    try:
        encode_dataset(recordings, tmp_path, encode=failing, **arguments)
    except Stopped:
        assert calls < 4
    again = []
    encode_dataset(recordings, tmp_path, encode=lambda v: again.append(len(v)) or pool(v), **arguments)
    assert sum(again) == (12 if calls < 2 else 6 if calls < 4 else 0)
    assert contents(tmp_path) == contents(encoded)


KILLED = """
import os, signal, sys
from tests.data.test_encode import encode_dataset, pool, settings
calls = iter(range(3))
def encode(video):
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return pool(video)
encode_dataset(sys.argv[1], sys.argv[2], encode=encode, settings=settings(palindromes=0.6), batch=3)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(recordings, encoded, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", KILLED, str(recordings), str(tmp_path)]
    assert subprocess.run(words, env=env, check=False).returncode == -signal.SIGKILL
    assert [p for p in (tmp_path / "shards").iterdir() if p.name.endswith(".tmp")]
    encode_dataset(recordings, tmp_path, encode=pool, settings=settings(palindromes=0.6), batch=3)
    assert contents(tmp_path) == contents(encoded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, r"begun with seed=0, not 3"),
        ({"palindromes": 0.1}, r"begun with palindromes=0.6, not 0.1"),
        ({"horizons": (17,)}, r"begun with horizons=\[33\], not \[17\]"),
        ({"vae_sha256": "cd" * 32}, r"begun with another VAE"),
    ],
)
def test_other_arguments_into_the_same_folder_are_refused_by_name(recordings, encoded, changes, message):
    with pytest.raises(ValueError, match=message):
        encode_dataset(recordings, encoded, encode=pool, settings=settings(**{"palindromes": 0.6, **changes}))


def test_a_folder_with_something_else_in_it_is_refused(recordings):
    with pytest.raises(ValueError, match="was not made here"):
        encode_dataset(recordings, recordings, encode=pool, settings=settings())


def test_what_does_not_fit_is_named(recordings, tmp_path):
    def run(source=recordings, encode=pool, **changes):
        encode_dataset(source, tmp_path / "out", encode=encode, settings=settings(**changes))

    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        run(source=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no index.parquet"):
        run(source=tmp_path)
    with pytest.raises(ValueError, match=r"num_frames=32 must be 4k\+1"):
        settings(horizons=(32,))
    with pytest.raises(ValueError, match=r"81 frames is longer than every recording.*has 65"):
        run(horizons=(81,))
    with pytest.raises(ValueError, match="must compress 4x8x8"):
        run(encode=lambda video: pool(video)[:, :2])
    with pytest.raises(ValueError, match="NaN or infinity of walk0"):
        run(encode=lambda video: pool(video) * float("nan"))
    mixed = write_dataset(
        tmp_path / "mixed", [("small", clip_sample(33)), ("large", clip_sample(33, size=96))]
    )
    with pytest.raises(ValueError, match=r"small is 64x64.*large is 96x96|large is 96x96.*small is 64x64"):
        run(source=mixed)


def test_a_damaged_recording_is_left_out_with_a_warning(tmp_path):
    whole, cut = clip_sample(33, seed=1), clip_sample(33, seed=2)
    middle = len(cut["mp4"]) // 2
    cut["mp4"] = cut["mp4"][:middle] + bytes(2000) + cut["mp4"][middle + 2000 :]
    source = write_dataset(tmp_path / "source", [("whole", whole), ("cut", cut)])
    rows = {row.key: row for row in Index.open(source).rows}
    assert rows["cut"].valid  # its header is sound: only decoding finds out
    with pytest.warns(UserWarning, match="left out frame 0 on of cut"):
        encode_dataset(source, tmp_path / "out", encode=pool, settings=settings(), max_corrupt=0.5)
    assert [row.source for row in Index.open(tmp_path / "out").rows] == ["whole"]
    with pytest.raises(ValueError, match=r"1 of 2 windows are unreadable, more than max_corrupt=0\.01"):
        encode_dataset(source, tmp_path / "strict", encode=pool, settings=settings())


def test_the_verb_encodes_with_a_vae_for_the_data_module(recordings, tmp_path, capsys):
    from relic.data import WorldDataModule

    config = TinyVAEConfig(latent_channels=4, patch=8, widths=(8,), encoder_depths=(1,), decoder_depths=(1,))
    vae, out = tmp_path / "vae.safetensors", tmp_path / "latents"
    TinyVAE(config).save(vae)
    encode_verb(str(recordings), out=str(out), vae=str(vae), horizon=(33,), device="cpu")
    assert "index.parquet" in capsys.readouterr().out
    row = Index.open(out).rows[0]
    assert row.vae_sha256 == file_sha256(vae)
    latents = load_array(members(out, row)[LATENTS])
    assert latents.shape == (9, 4, 8, 8) and np.abs(latents).max() > 0
    clip = ClipSpec(height=64, width=64, horizons=(17, 33))
    data = WorldDataModule(
        root=str(out), clip=clip, content="latents", global_batch=2, workers=0, vae=str(vae),
        validation_scenes=1, evaluation_scenes=1, validation_windows=2,
    )  # fmt: skip
    data.setup("fit")


def test_a_vae_of_another_kind_is_refused(recordings, tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_weights(path, {"weight": torch.zeros(1)}, kind="teacher", config={})
    with pytest.raises(ValueError, match="holds a teacher, but a tiny_vae is needed"):
        encode_verb(str(recordings), out=str(tmp_path / "out"), vae=str(path))
