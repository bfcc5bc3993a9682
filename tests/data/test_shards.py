from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from relic.data.schema import C2W, JSON, VIDEO, load_json
from relic.data.shards import pack_clip, pack_sample, read_clip, scan_shard, unpack_sample, write_shard
from relic.ops.actions import mean_step
from tests.data.recordings import INTRINSICS, clip_sample, noise_frames, smooth_path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    frames = list(noise_frames(40, seed=1))
    sample = clip_sample(40, seed=1, scene="hall")
    write_shard(tmp_path / "a.tar", [("walk", sample)])
    clip = read_clip(tmp_path / "a.tar", "walk")
    assert torch.equal(clip.c2w, smooth_path(40, seed=1))
    assert torch.equal(clip.intrinsics_px, INTRINSICS)
    assert (clip.fps, clip.captions[0]) == (16.0, "a hall with stairs")
    assert (clip.d_bar, True) == mean_step(clip.c2w)
    assert clip.provenance == {"scene": "hall", "seed": 1}
    error = np.abs(clip.video.numpy().astype(int) - np.stack(frames)).mean()
    assert error < 8  # crf 18 and halved colour on hard-edged noise


def test_packing_a_clip_again_keeps_all_but_the_compressed_frames() -> None:
    clip = unpack_sample(clip_sample(20))
    again = unpack_sample(pack_clip(clip))
    assert torch.equal(again.c2w, clip.c2w)
    assert (again.captions, again.d_bar, again.fps) == (clip.captions, clip.d_bar, clip.fps)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name, [("walk", clip_sample(20)), ("again", clip_sample(20, seed=1))])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("walk0", clip_sample(17)), ("walk1", clip_sample(20, seed=1))])
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["walk0", "walk1"]
    assert np.load(io.BytesIO(samples[1][C2W])).shape == (20, 4, 4)
    assert json.loads(samples[0][JSON])["num_frames"] == 17
    assert samples[0][VIDEO] == clip_sample(17)[VIDEO]


def test_frames_stream_into_the_encoder() -> None:
    alive: list[int] = []

    class Frame(np.ndarray):
        def __del__(self) -> None:
            alive.append(-1)

    def frames() -> Iterator[np.ndarray]:
        for frame in noise_frames(30, seed=0):
            assert sum(alive) <= 2, "frames pile up"
            alive.append(1)
            yield frame.view(Frame)

    pack_sample(
        frames=frames(), c2w=smooth_path(30, seed=0), intrinsics_px=INTRINSICS, fps=16, captions=(),
        provenance={"scene": "room"},
    )  # fmt: skip


def test_a_failed_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("old", clip_sample(17))])
    before = (tmp_path / "a.tar").read_bytes()

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield "walk", clip_sample(17)
        raise RuntimeError("the engine stopped")

    with pytest.raises(RuntimeError, match="the engine stopped"):
        write_shard(tmp_path / "a.tar", samples())
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == before


@pytest.mark.parametrize("keys", [["a.b"], ["a/b"], [""], ["a", "a"]])
def test_bad_keys_are_refused(tmp_path: Path, keys: list[str]) -> None:
    sample = clip_sample(17)
    with pytest.raises(ValueError, match=r"key|twice"):
        write_shard(tmp_path / "a.tar", [(key, sample) for key in keys])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c2w": smooth_path(16, seed=0)}, "17 frames but 16 poses"),
        ({"c2w": smooth_path(17, seed=0) * torch.tensor([1.0, 1.0, -1.0, 1.0])}, "reflection"),
        ({"c2w": smooth_path(17, seed=0) * float("nan")}, "NaN"),
        ({"c2w": smooth_path(17, seed=0) * 2}, "not rigid"),
        ({"provenance": {"seed": 1}}, "scene"),
        ({"fps": 0}, "fps=0"),
        ({"frames": iter([])}, "at least one frame"),
        ({"frames": (np.zeros((15, 16, 3), np.uint8) for _ in range(17))}, "even sides"),
        ({"intrinsics_px": torch.ones(3)}, "intrinsics_px"),
        ({"provenance": {"scene": "room", "when": float("inf")}}, "finite JSON"),
    ],
)
def test_bad_recordings_are_refused(change: dict, message: str) -> None:
    good = {
        "frames": noise_frames(17, seed=0), "c2w": smooth_path(17, seed=0), "intrinsics_px": INTRINSICS,
        "fps": 16.0, "captions": (), "provenance": {"scene": "room"},
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pack_sample(**(good | change))


def test_another_schema_is_a_clear_error() -> None:
    sample = clip_sample(17)
    description = json.loads(sample[JSON]) | {"schema": "relic-clip/0"}
    with pytest.raises(ValueError, match=r"'relic-clip/0'.*'relic-clip/1'"):
        unpack_sample(sample | {JSON: json.dumps(description).encode()})


def test_a_missing_field_or_member_is_named() -> None:
    sample = clip_sample(17)
    description = json.loads(sample[JSON])
    del description["d_bar"]
    with pytest.raises(ValueError, match="lacks d_bar"):
        load_json(json.dumps(description).encode(), schema="relic-clip/1")
    del sample[C2W]
    with pytest.raises(ValueError, match=r"missing: c2w\.npy"):
        unpack_sample(sample)


def test_scanning_a_truncated_shard_yields_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [("walk0", clip_sample(17)), ("walk1", clip_sample(17, seed=1))])
    whole = list(scan_shard(path))
    assert len(whole) == 6
    for cut in (whole[5].offset + 100, whole[5].offset - 300, whole[2].offset + whole[2].length + 400):
        cut_path = tmp_path / "cut.tar"
        cut_path.write_bytes(path.read_bytes()[:cut])
        found = []
        with pytest.raises(ValueError, match=r"cut\.tar"):
            for member in scan_shard(cut_path):
                found.append(member)  # what came before the error counts
        assert found == [member for member in whole if member.offset + member.length <= cut]


def test_a_missing_recording_is_a_key_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("walk", clip_sample(17))])
    with pytest.raises(KeyError, match="run"):
        read_clip(tmp_path / "a.tar", "run")
