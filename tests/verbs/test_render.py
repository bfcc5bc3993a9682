"""`relic render`: the plan, the shards, going on after an end of any kind, and errors before any work."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from relic.cli import main
from relic.data.index import Index
from relic.data.shards import read_clip
from relic.engine.building import make_scene
from relic.engine.trajectories import make_trajectory
from relic.verbs.render import plan_shards, render

TINY = {"scenes": 2, "minutes": 0.2, "size": (32, 48), "fps": 8, "backend": "software", "workers": 1}
WORDS = ["--scenes", "2", "--minutes", "0.2", "--size", "32", "48", "--fps", "8", "--backend", "software"]


def hashes(root: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((root / "shards").iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    render(out=str(root), **TINY)
    return root


def test_a_rendered_set_is_indexed_and_labelled(whole: Path) -> None:
    index = Index.open(whole)
    assert [row.key for row in index.rows] == ["scene-00000-rec-0000", "scene-00001-rec-0000"]
    assert all(row.valid for row in index.rows)
    assert [row.num_frames for row in index.rows] == [48, 48]
    clip = read_clip(whole / "shards" / "scene-00001.tar", "scene-00001-rec-0000")
    assert clip.video.shape == (48, 32, 48, 3)
    assert clip.provenance["scene"] == "seed0-scene-00001"
    assert clip.provenance["backend"] == "software"
    assert {"seed", "engine"} <= set(clip.provenance)
    assert len(clip.captions) == 2
    assert torch.equal(clip.c2w, make_trajectory(make_scene(0, 1), seed=0, frames=48, fps=8))


def test_finished_shards_are_kept_and_missing_ones_made_again(whole: Path, tmp_path: Path) -> None:
    render(out=str(tmp_path), **TINY)
    assert hashes(tmp_path) == hashes(whole), "the same seed gives the same bytes"
    first, second = sorted((tmp_path / "shards").iterdir())
    before = first.stat().st_mtime_ns
    second.unlink()
    leftover = second.with_name(f".{second.name}.123.tmp")
    leftover.write_bytes(b"half a shard")
    render(out=str(tmp_path), **TINY)
    assert hashes(tmp_path) == hashes(whole)
    assert first.stat().st_mtime_ns == before


def test_a_damaged_shard_is_made_again(whole: Path, tmp_path: Path) -> None:
    render(out=str(tmp_path), **TINY)
    path = tmp_path / "shards" / "scene-00001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    render(out=str(tmp_path), **TINY)
    assert hashes(tmp_path) == hashes(whole)


@pytest.mark.parametrize(
    ("other", "name"),
    [({"seed": 1}, "seed=0"), ({"size": (48, 48)}, "size=32 48"), ({"minutes": 0.3}, "minutes=0.2")],
)
def test_other_arguments_are_refused_by_name(whole: Path, other: dict, name: str) -> None:
    before = hashes(whole)
    with pytest.raises(ValueError, match=name):
        render(out=str(whole), **TINY | other)
    assert hashes(whole) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (30, 48)}, "height=30 must be a multiple of 16"),
        ({"size": (32, 50)}, "width=50 must be a multiple of 16"),
        ({"scenes": 0}, "scenes=0"),
        ({"minutes": -1.0}, "minutes=-1"),
        ({"fps": 0}, "fps=0"),
        ({"workers": 0}, "workers=0"),
        ({"clip_seconds": (80.0, 20.0)}, "clip_seconds"),
    ],
)
def test_a_wrong_argument_is_an_error_before_any_work(wrong: dict, message: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    with pytest.raises(ValueError, match=message):
        render(out=str(root), **TINY | wrong)
    assert not root.exists()


def test_a_folder_with_foreign_shards_is_left_alone(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "mine.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match="another folder"):
        render(out=str(tmp_path), **TINY)
    assert [path.name for path in shards.iterdir()] == ["mine.tar"]


def test_a_full_disk_leaves_no_part_of_a_shard_and_says_how_to_go_on(whole: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # a file of more fails to be written
        with pytest.raises(OSError, match=r"0 of 2 shards are finished.*run the same command") as caught:
            render(out=str(tmp_path), **TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    assert "MiB" in str(caught.value)
    assert list((tmp_path / "shards").iterdir()) == []
    render(out=str(tmp_path), **TINY)
    assert hashes(tmp_path) == hashes(whole)


def test_the_plan_divides_all_the_frames_into_recordings_of_the_lengths_asked_for() -> None:
    shards = plan_shards(scenes=7, minutes=31.0, fps=16, size=(128, 256), seed=3)
    lengths = [recording.frames / 16 for shard in shards for recording in shard.recordings]
    assert sum(shard.frames for shard in shards) == 31 * 60 * 16
    assert 28 < min(lengths) <= max(lengths) < 92
    assert len(set(lengths)) > 5
    assert len({recording.key for shard in shards for recording in shard.recordings}) == len(lengths)
    assert shards == plan_shards(scenes=7, minutes=31.0, fps=16, size=(128, 256), seed=3)


def test_few_minutes_give_one_recording_a_scene_and_many_bytes_several_shards() -> None:
    few = plan_shards(scenes=3, minutes=0.5, fps=16, size=(64, 96), seed=0)
    assert [len(shard.recordings) for shard in few] == [1, 1, 1]
    many = plan_shards(scenes=1, minutes=20.0, fps=16, size=(480, 832), seed=0)
    assert len(many) > 1
    assert [shard.name for shard in many[:2]] == ["scene-00000-part-00.tar", "scene-00000-part-01.tar"]


def test_the_command_line_takes_a_size_in_two_words(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["render", "--out", str(whole), *WORDS, "--workers", "1"])
    assert "2 shards, 96 frames, software" in capsys.readouterr().out


def command(root: Path, *, workers: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "relic.cli",
        "render",
        "--out",
        str(root),
        *WORDS,
        "--workers",
        str(workers),
    ]


@pytest.mark.slow
def test_two_workers_make_the_same_shards_as_one(whole: Path, tmp_path: Path) -> None:
    subprocess.run(command(tmp_path, workers=2), check=True)
    assert hashes(tmp_path) == hashes(whole)


@pytest.mark.slow
def test_a_killed_render_goes_on_with_nothing_lost_or_doubled(whole: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path, workers=2), stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any((tmp_path / "shards").glob(".*.tmp")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while alive(process.pid):  # its workers end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(command(tmp_path, workers=2), check=True)
    assert hashes(tmp_path) == hashes(whole)
    assert len(Index.open(tmp_path).rows) == 2


def alive(group: int) -> bool:
    """Whether any process of a session that a killed process led is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
