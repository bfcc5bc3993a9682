from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from relic.data.describe import revisits
from relic.data.index import Index, Row, write_index
from relic.data.schema import ACTIONS, C2W, JSON, LATENTS, VIDEO, dump_array
from relic.data.shards import read_clip, write_shard
from relic.ops.actions import encode_actions, integrate, parse_script
from tests.data.recordings import clip_sample, latents_sample, smooth_path, write_dataset


def with_fields(sample: dict[str, bytes], **fields: object) -> dict[str, bytes]:
    return sample | {JSON: json.dumps(json.loads(sample[JSON]) | fields).encode()}


def row_of(root: Path, key: str = "walk") -> Row:
    return next(row for row in Index.open(root).rows if row.key == key)


def test_a_row_tells_what_the_recording_holds(walks: Path) -> None:
    row = row_of(walks, "walk1")
    clip = read_clip(walks / row.shard, "walk1")
    assert (row.kind, row.scene, row.num_frames, row.fps, row.height, row.width) == (
        "clip",
        "scene1",
        113,
        16,
        64,
        64,
    )
    assert (row.d_bar, row.translates, row.captions) == (clip.d_bar, True, clip.captions)
    actions = encode_actions(clip.c2w, d_bar=clip.d_bar)
    assert row.action_sums.shape == (8, 13)  # 113 frames begin an eighth second
    assert np.allclose(row.action_sums[2], actions[32:48].sum(0), atol=1e-4)
    assert row.speed == pytest.approx(float(actions[1:, :6].norm(dim=1).mean()), rel=1e-6)


def test_byte_ranges_point_at_members(walks: Path) -> None:
    sample = clip_sample(97 + 16, seed=1, scene="scene1")
    row = row_of(walks, "walk1")
    data = (walks / row.shard).read_bytes()
    assert {name: data[offset : offset + length] for name, (offset, length) in row.ranges.items()} == sample


def test_the_index_is_deterministic_and_does_not_depend_on_shards(tmp_path: Path) -> None:
    samples = [(f"walk{i}", clip_sample(17, seed=i)) for i in range(4)]
    one = write_dataset(tmp_path / "one", samples, per_shard=4)
    two = write_dataset(tmp_path / "two", samples[::-1], per_shard=3)
    before = (one / "index.parquet").read_bytes()
    write_index(one)
    assert (one / "index.parquet").read_bytes() == before
    assert [row.key for row in Index.open(one).rows] == [row.key for row in Index.open(two).rows]


def test_latents_are_indexed(tmp_path: Path) -> None:
    root = write_dataset(
        tmp_path, [("walk", latents_sample(33, seed=2)), ("run", latents_sample(33, states=3))]
    )
    row = row_of(root)
    assert (row.kind, row.valid, row.num_frames, row.source, row.pivot) == ("latents", True, 33, "walk", None)
    assert row.vae_sha256 == "0" * 64
    assert set(row.ranges) == {LATENTS, ACTIONS, JSON}
    assert row.action_sums[:, 2].sum() == 32
    assert row_of(root, "run").kind == "latents"


def with_poses(change: str) -> dict[str, bytes]:
    c2w = smooth_path(17, seed=0).numpy()
    if change == "nan":
        c2w[5, 0, 0] = np.nan
    elif change == "scaled":
        c2w[:, :3, :3] *= 1.1
    elif change == "mirrored":
        c2w[:, :3, 0] *= -1
    elif change == "short":
        c2w = c2w[:16]
    elif change == "flat":
        c2w = c2w[0]
    return clip_sample(17) | {C2W: dump_array(c2w)}


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (with_poses("nan"), "NaN"),
        (with_poses("scaled"), "not rigid"),
        (with_poses("mirrored"), "reflection"),
        (with_poses("short"), "16 poses"),
        (with_poses("flat"), "shape"),
        (clip_sample(17) | {VIDEO: b"no video at all"}, "not readable"),
        (clip_sample(17) | {C2W: b"no array"}, "not a readable"),
        (clip_sample(17) | {JSON: b"{}"}, "schema None"),
        (with_fields(clip_sample(17), fps=0), "fps=0.0 must be positive"),
        (with_fields(clip_sample(17), d_bar=None), "NoneType"),
        (with_fields(clip_sample(17), provenance={}), "names no scene"),
        (with_fields(latents_sample(33), start="soon"), "soon"),
        ({VIDEO: clip_sample(17)[VIDEO]}, "lacks c2w.npy, json"),
        (latents_sample(33) | {ACTIONS: dump_array(np.zeros((30, 13), np.float32))}, "shape"),
        (latents_sample(33) | {ACTIONS: dump_array(np.full((33, 13), np.nan, np.float32))}, "NaN"),
        (latents_sample(33) | {LATENTS: dump_array(np.zeros((8, 4, 8, 8), np.float16))}, "9 latents"),
    ],
)
def test_what_cannot_be_used_has_a_reason(tmp_path: Path, sample: dict[str, bytes], reason: str) -> None:
    write_dataset(tmp_path, [("good", clip_sample(17)), ("walk", sample)])
    assert row_of(tmp_path, "good").valid
    assert not row_of(tmp_path).valid
    assert reason in row_of(tmp_path).reason


def test_a_key_used_twice_is_valid_once(tmp_path: Path) -> None:
    write_dataset(tmp_path, [("walk", clip_sample(17)), ("run", clip_sample(17))])
    write_shard(tmp_path / "shards" / "00001.tar", [("walk", clip_sample(17, seed=1))])
    write_index(tmp_path)
    twice = [row for row in Index.open(tmp_path).rows if row.key == "walk"]
    assert [(row.shard, row.valid) for row in twice] == [
        ("shards/00000.tar", True),
        ("shards/00001.tar", False),
    ]
    assert "shards/00000.tar" in twice[1].reason


def test_a_truncated_shard_keeps_its_whole_samples_and_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, [("walk0", clip_sample(17)), ("walk1", clip_sample(17, seed=1))], index=False)
    shard = tmp_path / "shards" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[: -shard.stat().st_size // 4])
    with pytest.warns(UserWarning, match=r"00000\.tar is cut short"):
        write_index(tmp_path)
    index = Index.open(tmp_path)
    assert [(row.key, row.valid) for row in index.rows] == [("walk0", True), ("walk1", False)]
    assert "cut short" in index.damaged["shards/00000.tar"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: the folder does not exist"):
        Index.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no index\.parquet.*write_index"):
        Index.open(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \*\.tar"):
        write_index(tmp_path)
    write_dataset(tmp_path, [(f"walk{i}", clip_sample(17)) for i in range(4)], per_shard=1)
    (tmp_path / "shards" / "00001.tar").unlink()
    (tmp_path / "shards" / "00003.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 4 .*shards/00001\.tar, shards/00003\.tar"):
        Index.open(tmp_path)


def test_a_shard_that_shrank_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, [("walk", clip_sample(17))])
    shard = tmp_path / "shards" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"shorter .*00000\.tar"):
        Index.open(tmp_path)


def test_an_index_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [("walk", clip_sample(17))]) / "index.parquet"
    table = pq.read_table(path)
    old = {"relic.schema": "relic-index/0", "relic.damaged": json.dumps({})}
    pq.write_table(table.replace_schema_metadata(old), path)
    with pytest.raises(ValueError, match=r"'relic-index/0'.*'relic-index/2'"):
        Index.open(tmp_path)


@pytest.mark.parametrize(
    ("script", "gap_s"),
    [
        ("dolly_in*64 dolly_out*64", 7.0),  # near the start again: away for all but half a second each way
        ("pan_left*180", 9.0),  # 2 degrees a frame: a full turn is 180 frames, less 20 degrees each side
        ("dolly_in*128", 0.0),
        ("static*128", 0.0),
        ("dolly_in*12 dolly_out*12", 0.0),  # away for less than 2 s
    ],
)
def test_revisits_are_returns_after_an_absence(script: str, gap_s: float) -> None:
    gaps = revisits(integrate(parse_script(script)), fps=16, d_bar=1.0)
    assert float(gaps.max()) == pytest.approx(gap_s, abs=1.5)
    assert bool((gaps > 0).any()) == (gap_s > 0)


def test_long_recordings_are_compared_at_a_few_looks_a_second() -> None:
    still = torch.eye(4, dtype=torch.float64).expand(16 * 100, 4, 4)
    assert revisits(still, fps=16, d_bar=1.0).shape == (400,)


def test_a_sample_of_unknown_members_only_is_invalid_and_does_not_stop_the_others(tmp_path):
    write_shard(tmp_path / "shards" / "00000.tar", [("walk", clip_sample(33)), ("README", {"txt": b"hello"})])
    write_index(tmp_path)
    assert {row.key: row.valid for row in Index.open(tmp_path).rows} == {"walk": True, "README": False}


def test_an_index_knows_scenes_that_left_no_sample_and_keeps_them_when_written_again(tmp_path):
    write_shard(tmp_path / "shards" / "00000.tar", [("walk", clip_sample(33, scene="hall"))])
    write_index(tmp_path, scenes=["attic", "hall"])
    write_index(tmp_path)
    assert Index.open(tmp_path).scenes == ("attic", "hall")
