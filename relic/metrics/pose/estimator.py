"""What a pose estimator is and gives, and an estimate laid over the commanded path."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from relic.ops.camera import check_rigid, invert_rigid, rigid

__all__ = ["PoseEstimate", "PoseEstimator", "anchor_to", "check_estimate", "check_video"]


class PoseEstimate(NamedTuple):
    """Poses found in a video.

    c2w: (f, 4, 4) float64, camera to world, OpenCV axes, any world and any scale; NaN where not registered.
    registered: (f,) bool, frames that got a pose.
    """

    c2w: Tensor
    registered: Tensor


class PoseEstimator(Protocol):
    """Anything that finds camera poses in a video."""

    def estimate(self, video: Tensor, *, intrinsics_px: Tensor) -> PoseEstimate:
        """Return the poses of video (f, h, w, 3) uint8.

        Of any picture, noise included: what cannot be found is not registered, and no error.

        intrinsics_px: (4,) `fx fy cx cy`, pixel centres at integers.
        """
        ...


def check_video(video: Tensor, intrinsics_px: Tensor) -> None:
    """Raise ValueError unless this is a video (f, h, w, 3) uint8 with the intrinsics (4,) of a camera."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != torch.uint8 or not video.numel():
        raise ValueError(
            f"video is {tuple(video.shape)} {video.dtype}; it must be (f, h, w, 3) uint8, at least one frame."
        )
    if intrinsics_px.shape != (4,):
        raise ValueError(
            f"intrinsics_px has shape {tuple(intrinsics_px.shape)}; it must be fx fy cx cy (4,)."
        )
    if not intrinsics_px.isfinite().all() or (intrinsics_px[:2] <= 0).any():
        values = ", ".join(f"{value:g}" for value in intrinsics_px.tolist())
        raise ValueError(
            f"intrinsics_px = ({values}) is no camera: fx fy cx cy must be finite and the focal lengths "
            "positive, in pixels of this video."
        )


def check_estimate(estimated: Tensor, *, frames: int) -> Tensor:
    """Return which rows of estimated c2w (f, 4, 4) are registered (f,) bool: a row is whole or all NaN.

    Raises:
        ValueError: If there are not `frames` rows, a row is partly NaN, or a pose is not rigid.
    """
    if estimated.shape != (frames, 4, 4):
        raise ValueError(
            f"the estimate has shape {tuple(estimated.shape)} for {frames} true poses; it must be "
            f"({frames}, 4, 4), with NaN where a frame was not registered."
        )
    missing = estimated.isnan().flatten(1)
    partly = missing.any(1) & ~missing.all(1)
    if partly.any():
        raise ValueError(
            f"estimated pose {int(partly.nonzero()[0])} is partly NaN; write a frame that was not registered "
            "as 16 NaN."
        )
    registered = ~missing.all(1)
    if registered.any():
        check_rigid(estimated[registered], name="estimated c2w")
    return registered


def anchor_to(estimated: Tensor, truth: Tensor) -> Tensor:
    """Lay an estimate over the commanded path, to ask whether the camera left and came back.

    estimated: (f, 4, 4) c2w, NaN where not registered; truth: (f, 4, 4) -> (f, 4, 4), NaN where not
    registered.

    The first registered frame takes the true pose, since a generated video starts from a true picture; the
    scale makes both paths equally wide (root mean square distance from that frame). No other fit is made: a
    camera that turned the wrong way shows as such. Scale is free, so a camera that moves by half the
    commanded steps looks right, and one that was told only to turn gets no translation.

    Raises:
        ValueError: If lengths differ, a matrix is not rigid, or a row is partly NaN.
    """
    check_rigid(truth, name="truth")
    registered = check_estimate(estimated, frames=len(truth))
    if not registered.any():
        return estimated.double().clone()
    first = int(registered.nonzero()[0])
    estimated, truth = estimated.double(), truth.double()
    local = invert_rigid(estimated[first]) @ estimated
    wide, true_wide = (
        path[registered, :3, 3].square().sum(-1).mean().sqrt()
        for path in (local, invert_rigid(truth[first]) @ truth)
    )
    scale = true_wide / wide if wide > 0 else 1.0
    laid = truth[first] @ rigid(local[:, :3, :3], local[:, :3, 3] * scale)
    return torch.where(registered[:, None, None], laid, torch.nan)
