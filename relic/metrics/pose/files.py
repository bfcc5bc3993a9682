"""Poses that another program has found: read from ViPE's archives or COLMAP's text files, by video name."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relic.metrics.pose.estimator import PoseEstimate, check_estimate, check_video

__all__ = ["PoseFiles", "read_colmap", "read_vipe"]

IMAGE_FIELDS: Final = 10  # id, qw qx qy qz, tx ty tz, camera, name


class PoseFiles(NamedTuple):
    """The poses of one video, as an estimator that reads `folder` instead of looking.

    A video `stem` has its poses in `folder/pose/stem.npz` (ViPE) or in `folder/stem/images.txt` (COLMAP; the
    number in a picture's name is its frame, from 0 or 1). Say which video comes with `of`:
    `PoseFiles(folder, stem="").of("clip_3").estimate(video, intrinsics_px=…)`.
    """

    folder: Path
    stem: str

    def of(self, stem: str) -> PoseFiles:
        """Return the reader of another video's poses."""
        return self._replace(stem=stem)

    def estimate(self, video: Tensor, *, intrinsics_px: Tensor) -> PoseEstimate:
        """Return the stored poses of video (f, h, w, 3); the intrinsics are not used.

        Raises:
            FileNotFoundError: If there is no file for this video.
            ValueError: If a file is damaged or holds poses of frames that the video lacks.
        """
        check_video(video, intrinsics_px)
        vipe = Path(self.folder) / "pose" / f"{self.stem}.npz"
        colmap = Path(self.folder) / self.stem / "images.txt"
        if vipe.exists():
            return read_vipe(vipe, frames=len(video))
        if colmap.exists():
            return read_colmap(colmap, frames=len(video))
        raise FileNotFoundError(f"no poses of {self.stem!r}: there is neither {vipe} nor {colmap}.")


def read_vipe(path: Path, *, frames: int) -> PoseEstimate:
    """Read ViPE's pose archive: `data` (n, 4, 4) c2w in OpenCV axes, `inds` (n,) the frames they are of."""
    with np.load(path) as archive:
        missing = {"data", "inds"} - set(archive.files)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; ViPE writes data and inds.")
        poses, places = archive["data"].astype(np.float64), archive["inds"].astype(int)
    if poses.shape != (len(places), 4, 4):
        raise ValueError(f"{path}: data is {poses.shape} for {len(places)} frames; it must be (n, 4, 4).")
    return _placed(poses, places, frames=frames, path=path)


def read_colmap(path: Path, *, frames: int) -> PoseEstimate:
    """Read COLMAP's images.txt: w2c as quaternion w x y z and translation, two lines a picture.

    The number in a picture's name is its frame; numbers may start at 0 or, if there is no 0, at 1.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    poses, places = [], []
    for line in lines[::2]:  # the second line of each picture lists its points, and may be empty
        fields = line.split(maxsplit=IMAGE_FIELDS - 1)
        digits = "".join(filter(str.isdigit, Path(fields[-1]).stem)) if len(fields) == IMAGE_FIELDS else ""
        if not digits:
            raise ValueError(
                f"{path}: {line!r} is not a picture (id, quaternion, translation, camera, numbered name)."
            )
        values = np.array(fields[1:8], dtype=np.float64)
        rotation = _rotation(values[:4]).T
        poses.append(np.eye(4))
        poses[-1][:3, :3], poses[-1][:3, 3] = rotation, -rotation @ values[4:]
        places.append(int(digits))
    first = 0 if 0 in places else 1
    return _placed(np.array(poses).reshape(-1, 4, 4), np.array(places, int) - first, frames=frames, path=path)


def _placed(poses: np.ndarray, places: np.ndarray, *, frames: int, path: Path) -> PoseEstimate:
    """Put poses (n, 4, 4) at their frames (n,), NaN elsewhere."""
    if len(places) and (places.min() < 0 or places.max() >= frames):
        raise ValueError(
            f"{path} has poses of frames {places.min()} to {places.max()}, the video has {frames} frames."
        )
    if len(set(places.tolist())) < len(places):
        raise ValueError(f"{path} has several poses of one frame.")
    c2w = np.full((frames, 4, 4), np.nan)
    c2w[places] = poses
    tensor = torch.from_numpy(c2w)
    return PoseEstimate(c2w=tensor, registered=check_estimate(tensor, frames=frames))


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    """Return the rotation (3, 3) of a quaternion w x y z."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross
