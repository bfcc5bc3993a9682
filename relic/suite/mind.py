"""The MIND benchmark as a suite: its folder in, videos and `result.json` in its own layout out.

MIND-Data/{1st_data,3rd_data}/test/{mem_test,action_space_test}/<name>/{action.json,video.mp4}

Poses are Unreal's: centimetres and degrees, roll, pitch and yaw in x, y, z. Third-person clips have the
camera's own; in first person the actor is the camera. Frames before `mark_time` are context, from there on
is generated. Clips are played frame for frame: at 24 frames a second and a world of 16, time runs slower,
and so do motions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from relic.data.video import encode_video
from relic.metrics.closure import FrameScore
from relic.metrics.pose.estimator import PoseEstimator
from relic.metrics.similarity import psnr, ssim
from relic.metrics.trajectory_error import mind_errors
from relic.ops.camera import check_rigid, unreal_to_opencv
from relic.suite.case import NoTruth
from relic.suite.judges import Judges
from relic.suite.recordings import Shape, fit_picture, read_frames
from relic.suite.scripts import Measures
from relic.types import Clip

__all__ = ["MindCase", "find_mind", "lcm_result", "mind_result", "write_mind_video"]

PERSPECTIVES: Final = ("1st_data", "3rd_data")
TESTS: Final[dict[str, Measures]] = {"mem_test": "memory", "action_space_test": "action"}
SCORED: Final = 97  # frames from mark_time of which MIND scores the motion
FIELD_OF_VIEW_DEG: Final = 90.0  # horizontal, Unreal's default; MIND says nothing of it
PLAYED: Final = "video.mp4"
KEYS: Final = (("ws", "forward", "backward"), ("ad", "left", "right"), ("ud", "look_up", "look_down"),
               ("lr", "look_left", "look_right"))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MindCase:
    """A clip of MIND; see `relic.suite.case.Case`.

    Args:
        folder: With its action.json and video.mp4.
        shape: What the contestants take.
    """

    folder: Path
    shape: Shape

    @property
    def name(self) -> str:
        """E.g. "1st_data-mem_test-data-26"."""
        return f"{self.perspective}-{self.test}-{self.folder.name}"

    @property
    def perspective(self) -> str:
        return self.folder.parts[-4]

    @property
    def test(self) -> str:
        return self.folder.parts[-2]

    @property
    def group(self) -> str:
        return f"{self.perspective} {self.test}"

    @property
    def measures(self) -> Measures:
        return TESTS[self.test]

    @property
    def words(self) -> str:
        """What is held, with the frames it is held for."""
        return " ".join(f"{word}*{len(list(run))}" for word, run in groupby(self.keys()))

    @property
    def num_frames(self) -> int:
        return self.outward + 1 + self._generated

    @property
    def outward(self) -> int:
        """Frames of context after the first that is shown: whole blocks."""
        most = self.shape.most_frames - self._generated
        return self.shape.whole(max(1, min(self._card["mark_time"], most))) - 1

    @property
    def start(self) -> int:
        """Frame of the recording that is the image."""
        return max(0, self._card["mark_time"] - 1 - self.outward)

    @property
    def mark(self) -> int:
        """Frame of the recording at which generation starts; `mark_time`, or 1 where that is 0."""
        return self.start + self.outward + 1

    @property
    def _generated(self) -> int:
        """Frames to generate: enough for the motion scores, but at most half a horizon; whole blocks."""
        block = self.shape.block_frames
        there = (self._card["total_time"] - max(1, self._card["mark_time"])) // block * block
        wanted = -(-SCORED // block) * block
        half = (self.shape.most_frames - 1) // 2 // block * block
        return max(block, min(there, wanted, half))

    @property
    def _card(self) -> dict[str, Any]:
        return read_card(self.folder / "action.json")

    def keys(self) -> list[str]:
        """Return what is held in each frame that is shown, "forward+look_left" or "no_op".

        As MIND's code reads them: 1 is the first and 2 the second of a pair, 0 none; its README says 0 and 1.
        """
        rows = self._card["data"][self.start : self.start + self.num_frames]
        return [held_keys(row) for row in rows]

    def truth(self) -> Clip:
        """Read the clip.

        Raises:
            NoTruth: If it is shorter than one generated block, or its files are damaged.
        """
        card = self._card
        stop = self.start + self.num_frames
        if stop > min(card["total_time"], len(card["data"])):
            raise NoTruth(
                f"{self.folder.name} has {card['total_time']} frames from which {self.num_frames} from "
                f"{self.start} on can't be taken."
            )
        try:
            c2w = read_poses(card["data"][self.start : stop])
            video, source = read_frames(
                self.folder / "video.mp4", start=self.start, stop=stop, size=self.shape.size
            )
        except (OSError, ValueError, KeyError) as error:
            raise NoTruth(f"{self.folder}: {error}") from error
        half = torch.tensor(FIELD_OF_VIEW_DEG / 2, dtype=torch.float64).deg2rad().tan()
        focal = source[1] / 2 / float(half)
        intrinsics = torch.tensor(
            [focal, focal, (source[1] - 1) / 2, (source[0] - 1) / 2], dtype=torch.float64
        )
        return Clip(
            video=video,
            c2w=c2w,
            intrinsics_px=fit_picture(intrinsics, source=source, size=self.shape.size),
            fps=self.shape.fps,
            d_bar=self.shape.d_bar,
            captions=(str(card.get("caption") or ""),),
            provenance={
                "benchmark": "MIND",
                "path": self.folder.name,
                "start": self.start,
                "mark": self.mark,
            },
        )

    def extras(self, video: Tensor, truth: Clip, *, judges: Judges, folder: Path) -> dict[str, Any]:
        """Write the generated part where MIND's tool looks for it; return its entries of result.json.

        As there, the true cameras are those estimated from the true video.
        """
        write_mind_video(video, self, root=folder)
        made, true = video[self.outward + 1 :], truth.video[self.outward + 1 :]
        found: dict[str, Any] = {"lcm": lcm_result(made, true, lpips=judges.lpips)}
        if judges.estimator is not None:
            try:
                cameras = [_camera(part, truth, judges.estimator) for part in (made, true)]
                found["action"] = mind_errors(*cameras, actions=self.keys()[self.outward + 1 :])
            except ValueError as error:  # too short, or a frame without a pose: MIND leaves such clips out
                found["error"] = str(error)
        return {"mind": found}


def _camera(video: Tensor, truth: Clip, estimator: PoseEstimator) -> Tensor:
    """Return the poses of a video, which must all be found."""
    found = estimator.estimate(video, intrinsics_px=truth.intrinsics_px)
    if not found.registered.all():
        lost = int((~found.registered).nonzero()[0])
        raise ValueError(
            f"motion: frame {lost} after the mark has no pose, and MIND scores whole paths only."
        )
    return found.c2w


def find_mind(root: str | Path, *, shape: Shape) -> list[MindCase]:
    """Find the test clips of a MIND folder, in order.

    Raises:
        FileNotFoundError: If there is none.
    """
    folders = [
        path.parent
        for perspective in PERSPECTIVES
        for test in TESTS
        for path in sorted(Path(root).glob(f"{perspective}/test/{test}/*/action.json"))
    ]
    if not folders:
        raise FileNotFoundError(
            f"{root} holds no MIND clips; they are in 1st_data/test/mem_test/<name>/action.json and so on."
        )
    return [MindCase(folder=folder, shape=shape) for folder in folders]


@lru_cache(maxsize=16)
def read_card(path: Path) -> dict[str, Any]:
    """Read an action.json.

    Raises:
        ValueError: If it lacks something.
    """
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    lacking = [name for name in ("mark_time", "total_time", "data") if name not in card]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}; it is no action.json of MIND.")
    return card


def read_poses(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return c2w (f, 4, 4) in metres from rows of an action.json: the camera's if given, else the actor's."""
    kind = "camera" if rows and "camera_pos" in rows[0] else "actor"
    position = torch.tensor(
        [[row[f"{kind}_pos"][axis] for axis in "xyz"] for row in rows], dtype=torch.float64
    )
    angles = torch.tensor([[row[f"{kind}_rpy"][axis] for axis in "xyz"] for row in rows], dtype=torch.float64)
    roll, pitch, yaw = angles.unbind(-1)
    c2w = unreal_to_opencv(position, pitch_deg=pitch, yaw_deg=yaw, roll_deg=roll)
    check_rigid(c2w)
    return c2w


def held_keys(row: Mapping[str, Any]) -> str:
    """Return what is held in a row of an action.json, e.g. "forward+look_left"."""
    held = [(first, second)[row[name] - 1] for name, first, second in KEYS if row.get(name) in (1, 2)]
    return "+".join(held) or "no_op"


# -- results in MIND's layout --------------------------------------------------------------------------------


def write_mind_video(video: Tensor, case: MindCase, *, root: str | Path, fps: float = 24.0) -> Path:
    """Write the generated part of a video where MIND's own tool looks for it; return the path.

    video: uint8 (f, h, w, 3) of the whole case.
    """
    path = Path(root) / case.perspective / case.test / case.folder.name / PLAYED
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_video(video[case.outward + 1 :].numpy(), fps=fps)[0])
    return path


def lcm_result(video: Tensor, truth: Tensor, *, lpips: FrameScore | None = None) -> dict[str, Any]:
    """Return MIND's `lcm` entry: mse, psnr, ssim and lpips of generated frames, and their means.

    video, truth: uint8 (f, h, w, 3), scored at that size; MIND's tool scales both to 720x1280 first.
    """
    decibels = psnr(video, truth)
    rows = {"mse": 10 ** (-decibels.double() / 10), "psnr": decibels, "ssim": ssim(video, truth)}
    rows |= {} if lpips is None else {"lpips": lpips(video, truth)}
    result: dict[str, Any] = {"length": len(video)}
    for name, values in rows.items():
        result |= {name: values.tolist(), f"avg_{name}": float(values.mean())}
    return result


def mind_result(entries: Iterable[tuple[MindCase, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what MIND's tool writes as result.json.

    entries: cases and what was measured of each by MIND's names: `lcm`, `action`, or `error`.
    """
    return {
        "video_max_time": None,
        "data": [
            {
                "path": case.folder.name,
                "perspective": case.perspective,
                "test_type": case.test,
                "error": found.get("error"),
                "mark_time": case.mark,
                "total_time": case._card["total_time"],
                "sample_frames": case.num_frames - 1 - case.outward,
                **{name: found[name] for name in ("lcm", "action") if name in found},
            }
            for case, found in entries
        ],
    }
