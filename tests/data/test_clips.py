from __future__ import annotations

from pathlib import Path

import pytest
import torch

from relic.data import WorldDataModule, read_clip, read_clips
from relic.types import Clip, ClipSpec


def clips_of(root: Path, **settings) -> list[Clip]:
    defaults = {
        "split": "train",
        "num_clips": 3,
        "num_frames": 33,
        "seed": 0,
        "validation_scenes": 1,
        "evaluation_scenes": 1,
    }
    return read_clips(root, **(defaults | settings))


def test_a_clip_is_a_part_of_its_recording(walks: Path) -> None:
    for clip in clips_of(walks):
        shards = sorted((walks / "shards").glob("*.tar"))
        key, start = clip.provenance["key"], clip.provenance["start"]
        whole = read_clip(shards[int(key[-1]) // 2], key)
        assert torch.equal(clip.video, whole.video[start : start + 33])
        assert torch.equal(clip.c2w, whole.c2w[start : start + 33])
        assert torch.equal(clip.intrinsics_px, whole.intrinsics_px)
        assert (clip.d_bar, clip.fps) == (whole.d_bar, whole.fps)
        assert clip.captions == whole.captions[start >= 80 :]


def test_clips_are_fixed_and_come_from_different_recordings(walks: Path) -> None:
    first, again, other = clips_of(walks), clips_of(walks), clips_of(walks, seed=1)
    places = [
        [(clip.provenance["key"], clip.provenance["start"]) for clip in clips]
        for clips in (first, again, other)
    ]
    assert places[0] == places[1] != places[2]
    assert len({key for key, _ in places[0]}) == 3


def test_splits_are_those_of_the_data_module(walks: Path) -> None:
    data = WorldDataModule(
        root=str(walks),
        clip=ClipSpec(height=64, width=64, horizons=(33,)),
        validation_scenes=1,
        evaluation_scenes=1,
    )
    data.setup("fit")
    held = {row.scene for row in data._rows["validation"]}
    assert {clip.provenance["scene"] for clip in clips_of(walks, split="validation")} == held


def test_size_and_rate_follow_the_clip_asked_for(walks: Path) -> None:
    (clip,) = clips_of(walks, num_clips=1, clip=ClipSpec(height=32, width=32, fps=8, horizons=(33,)))
    assert (clip.video.shape, clip.fps) == ((33, 32, 32, 3), 8)
    assert clip.intrinsics_px.tolist() == [25, 25, 15.5, 15.5]
    steps = (clip.c2w[1:, :3, 3] - clip.c2w[:-1, :3, 3]).norm(dim=1)
    assert float(steps.mean()) == pytest.approx(clip.d_bar, rel=0.3)


def test_more_clips_than_windows_is_an_error(walks: Path) -> None:
    with pytest.raises(ValueError, match=r"windows of 33 frames, 500 were asked for"):
        clips_of(walks, num_clips=500)
