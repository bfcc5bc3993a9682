"""The MemoBench benchmark's synthetic clips as a suite: its folder in, frames in its own layout out.

Synthetic_processed/<Scene>/<Scene>_<NNN>/RGB<n>/*.jpg     true frames
                                         <n>/poses.npy     (f, 4, 4) camera to world, OpenCV axes
                                         <n>/intrinsics.npy (f, 4) fx fy cx cy
                                         camera_full<n>.csv  the raw camera track, where poses.npy is missing
Synthetic_processed/Synthetic_ExitReenter.xlsx             when the object leaves and returns; save it as .csv
sam3_metadata/synthetic_metadata.csv                       prompts

Frames are resampled evenly to the length that is generated, as MemoBench does. It does not say in what unit
its poses are, so a clip's own mean moving step is its d̄: the one place where truth does not carry the
world's.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from relic.metrics.retrieval import FrameScore, score_frames
from relic.ops.actions import mean_step
from relic.ops.camera import check_rigid
from relic.suite.case import NoTruth
from relic.suite.judges import Judges
from relic.suite.recordings import Shape, crop_window, fit_picture
from relic.suite.scripts import Measures
from relic.types import Clip

__all__ = ["MemoBenchCase", "find_memobench", "phase_scores", "write_memobench_frames"]

FRAMES: Final = {".jpg", ".jpeg", ".png"}
PHASES_CSV: Final = "Synthetic_ExitReenter.csv"
PROMPTS_CSV: Final = "sam3_metadata/synthetic_metadata.csv"


@dataclass(frozen=True, kw_only=True)
class MemoBenchCase:
    """A synthetic clip of MemoBench; see `relic.suite.case.Case`.

    Args:
        folder: <Scene>/<Scene>_<NNN>.
        shape: What the contestants take.
        prompt: What is there and happens, empty if not given.
        leaves: Frame at which the object leaves the view, and at which it returns, of the true frames; None
            if not given.
    """

    folder: Path
    shape: Shape
    prompt: str = ""
    leaves: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """E.g. "Barnyard_001"."""
        return self.folder.name

    @property
    def group(self) -> str:
        return self.folder.parent.name

    @property
    def measures(self) -> Measures:
        return "action"  # from the image alone; the phases say what it remembers

    @property
    def words(self) -> str:
        return self.prompt or "the recorded camera path"

    @property
    def num_frames(self) -> int:
        return self.shape.whole(len(self.pictures()))

    @property
    def outward(self) -> int:
        return 0

    @property
    def number(self) -> int:
        """The clip's number, which its subfolders end in."""
        found = re.search(r"_(\d+)$", self.folder.name)
        if found is None:
            raise ValueError(f"{self.folder}: the name must end in _<number>, e.g. Barnyard_001.")
        return int(found[1])

    def pictures(self) -> list[Path]:
        """Return the true frames in order."""
        folder = self.folder / f"RGB{self.number}"
        return sorted(path for path in folder.glob("*") if path.suffix.lower() in FRAMES)

    def taken(self) -> list[int]:
        """Return which true frames are played: evenly spaced, the first and the last among them."""
        count, there = self.num_frames, len(self.pictures())
        return [round(i * (there - 1) / max(1, count - 1)) for i in range(count)]

    def phases(self) -> tuple[range, range, range] | None:
        """Return the played frames in which the object is visible, gone, and back; None if not given."""
        if self.leaves is None:
            return None
        scale = (self.num_frames - 1) / max(1, len(self.pictures()) - 1)
        out, back = (min(self.num_frames, max(1, round(frame * scale))) for frame in self.leaves)
        return range(out), range(out, back), range(back, self.num_frames)

    def truth(self) -> Clip:
        """Read the clip.

        Raises:
            NoTruth: If frames or poses are missing, damaged or of other lengths.
        """
        try:
            paths = self.pictures()
            if len(paths) <= self.shape.block_frames:
                raise ValueError(f"{len(paths)} frames are fewer than the image and a block.")
            c2w, intrinsics_px = self._camera()
            if len(c2w) != len(paths):
                raise ValueError(f"{len(c2w)} poses and {len(paths)} frames; there must be one a frame.")
            check_rigid(c2w)
            taken = self.taken()
            with Image.open(paths[0]) as first:
                source = (first.height, first.width)
            video = torch.stack([_picture(paths[i], size=self.shape.size) for i in taken])
        except (OSError, ValueError, KeyError) as error:
            raise NoTruth(f"{self.folder}: {error}") from error
        c2w = c2w[taken]
        return Clip(
            video=video,
            c2w=c2w,
            intrinsics_px=fit_picture(intrinsics_px, source=source, size=self.shape.size),
            fps=self.shape.fps,
            d_bar=mean_step(c2w)[0],
            captions=(self.prompt,),
            provenance={"benchmark": "MemoBench", "path": f"{self.group}/{self.name}", "frames": len(paths)},
        )

    def extras(self, video: Tensor, truth: Clip, *, judges: Judges, folder: Path) -> dict[str, Any]:
        """Write the frames where MemoBench's tools look for them; return the scores of the phases, if
        known.
        """
        write_memobench_frames(video, self, root=folder)
        if self.leaves is None:
            return {}
        return {"scores": phase_scores(video, truth.video, self, lpips=judges.lpips)}

    def _camera(self) -> tuple[Tensor, Tensor]:
        """Return c2w (f, 4, 4) and intrinsics (4,) of the recording."""
        shipped = self.folder / str(self.number)
        if (shipped / "poses.npy").is_file():
            c2w = torch.from_numpy(np.load(shipped / "poses.npy").astype(np.float64))
            rows = np.load(shipped / "intrinsics.npy").astype(np.float64)
            return c2w, torch.from_numpy(rows.reshape(-1, 4)[0].copy())
        rows = list(_rows(self.folder / f"camera_full{self.number}.csv"))
        values = {name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
                  for name in ("loc_x", "loc_y", "loc_z", "rot_x", "rot_y", "rot_z")}  # fmt: skip
        return csv_poses(values), torch.tensor([float(rows[0][n]) for n in ("fx", "fy", "cx", "cy")],
                                               dtype=torch.float64)  # fmt: skip


def csv_poses(values: Mapping[str, Tensor]) -> Tensor:
    """Return c2w (f, 4, 4) of a raw camera track, as MemoBench's code reads it.

    R = Rz·Ry·Rx of left-handed matrices, angles taken as radians, then the camera's y and z turned over.
    Prefer poses.npy: no document says that these axes are right.
    """
    x, y, z = (values[f"rot_{axis}"] for axis in "xyz")
    one, zero = torch.ones_like(x), torch.zeros_like(x)

    def matrix(*entries: Tensor) -> Tensor:
        return rearrange(torch.stack(entries, -1), "f (i j) -> f i j", i=3)

    rx = matrix(one, zero, zero, zero, x.cos(), x.sin(), zero, -x.sin(), x.cos())
    ry = matrix(y.cos(), zero, -y.sin(), zero, one, zero, y.sin(), zero, y.cos())
    rz = matrix(z.cos(), z.sin(), zero, -z.sin(), z.cos(), zero, zero, zero, one)
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(x), 1, 1)
    c2w[:, :3, :3] = rz @ ry @ rx * x.new_tensor([1.0, -1.0, -1.0])
    c2w[:, :3, 3] = torch.stack([values[f"loc_{axis}"] for axis in "xyz"], -1)
    return c2w


def find_memobench(root: str | Path, *, shape: Shape) -> list[MemoBenchCase]:
    """Find the synthetic clips below a MemoBench data folder, with prompts and phases where their tables are.

    Raises:
        FileNotFoundError: If there is none.
    """
    root = Path(root)
    base = root / "Synthetic_processed"
    folders = sorted(p for p in base.glob("*/*_*") if p.is_dir() and re.search(r"_\d+$", p.name))
    if not folders:
        raise FileNotFoundError(
            f"{root} holds no MemoBench clips; they are in Synthetic_processed/<Scene>/<Scene>_<NNN>."
        )
    told = _rows(root / PROMPTS_CSV, "scene", "video_id", optional=True)
    prompts = {_clip_name(row): row.get("prompt", "") for row in told}
    phases = {
        _clip_name(row): (int(float(row["exits"])), int(float(row["re-enter"])))
        for row in _rows(base / PHASES_CSV, "scene", "video_id", "exits", "re-enter", optional=True)
        if row.get("exits") and row.get("re-enter")
    }
    return [
        MemoBenchCase(
            folder=folder, shape=shape, prompt=prompts.get(folder.name, ""), leaves=phases.get(folder.name)
        )
        for folder in folders
    ]


def phase_scores(
    video: Tensor, truth: Tensor, case: MemoBenchCase, *, lpips: FrameScore | None = None
) -> dict[str, float]:
    """Return the means of each phase against truth: `phase/psnr_visible`, `_gone`, `_back`, and so on.

    PSNR, SSIM and LPIPS, at the size of the frames given; empty phases are left out. video, truth: uint8
    (f, h, w, 3).

    Raises:
        ValueError: If the phases are not known.
    """
    phases = case.phases()
    if phases is None:
        raise ValueError(
            f"{case.name}: no phases; save Synthetic_ExitReenter.xlsx as {PHASES_CSV} beside it."
        )
    found: dict[str, float] = {}
    for phase, frames in zip(("visible", "gone", "back"), phases, strict=True):
        if len(frames):
            part = slice(frames.start, frames.stop)
            scores = score_frames(video[part], truth[part], lpips=lpips)
            for name in ("psnr", "ssim", "lpips"):
                values = getattr(scores, name)
                if values is not None:
                    found[f"phase/{name}_{phase}"] = float(values.mean())
    return found


def write_memobench_frames(video: Tensor, case: MemoBenchCase, *, root: str | Path) -> Path:
    """Write a video as the PNGs that MemoBench's own tools read; return their folder."""
    folder = Path(root) / "Synthetic" / case.group / case.name / "frames"
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(video.numpy()):
        Image.fromarray(frame).save(folder / f"{index:05d}.png")
    return folder


def _picture(path: Path, *, size: tuple[int, int]) -> Tensor:
    """Return a frame scaled and cropped to `size`, (h, w, 3) uint8."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    _, height, width, top, left = crop_window((picture.height, picture.width), size)
    scaled = picture.resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(scaled.crop((left, top, left + size[1], top + size[0]))))


def _rows(path: Path, *columns: str, optional: bool = False) -> list[dict[str, str]]:
    """Return the rows of a table that has these columns, none if an optional one is not there."""
    if optional and not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        lacking = [name for name in columns if name not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(
                f"{path} has no column {', '.join(lacking)}; it has {', '.join(reader.fieldnames or ())}. "
                "Save the table with its headers as CSV."
            )
        return list(reader)


def _clip_name(row: Mapping[str, str]) -> str:
    """Return e.g. "Barnyard_001" of a row, whose `video_id` may be 1, 001 or the whole name."""
    number = row["video_id"].rsplit("_", 1)[-1]
    return f"{row['scene']}_{int(float(number)):03d}"
