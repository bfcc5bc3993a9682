"""A recording: a path through a scene, its pictures and captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relic.engine.captions import describe
from relic.engine.capture import FIELD_OF_VIEW_DEG, Backend, Camera, intrinsics_of
from relic.engine.scenes import Scene
from relic.engine.trajectories import make_trajectory
from relic.ops.actions import mean_step
from relic.types import Clip

__all__ = ["ENGINE_VERSION", "Take", "film", "plan_take"]

ENGINE_VERSION = "relic-engine/1"  # changes whenever the same seed gives other pictures or paths


class Take(NamedTuple):
    """What a recording is, before it is rendered.

    c2w: (f, 4, 4) float64, OpenCV axes, metres; intrinsics_px: (4,); captions: one per 5 s.
    """

    scene: Scene
    seed: int
    c2w: Tensor
    intrinsics_px: Tensor
    fps: float
    captions: tuple[str, ...]

    def pictures(self, camera: Camera) -> Iterator[np.ndarray]:
        """Render with a camera in the same scene: (h, w, 3) uint8 RGB, one a pose."""
        return (camera.picture(pose) for pose in self.c2w.numpy())

    def provenance(self, camera: Camera) -> Mapping[str, Any]:
        """Say where the pictures come from."""
        return {
            "scene": self.scene.name, "seed": self.scene.seed, "scene_index": self.scene.index,
            "recording": self.seed, "engine": ENGINE_VERSION, "backend": camera.backend,
        }  # fmt: skip


def plan_take(scene: Scene, *, seed: int, frames: int, fps: float, size: tuple[int, int]) -> Take:
    """Plan a recording: a pure function of its arguments. size: (height, width)."""
    c2w = make_trajectory(scene, seed=seed, frames=frames, fps=fps)
    intrinsics_px = intrinsics_of(size, field_of_view_deg=FIELD_OF_VIEW_DEG)
    captions = describe(scene, c2w, fps=fps, intrinsics_px=intrinsics_px)
    return Take(scene, seed, c2w, intrinsics_px, fps, captions)


def film(
    scene: Scene,
    *,
    seed: int = 0,
    c2w: Tensor | None = None,
    frames: int = 81,
    fps: float = 16.0,
    size: tuple[int, int] = (128, 256),
    backend: Backend = "auto",
) -> Clip:
    """Render one clip whole: along given poses (f, 4, 4), for scripted truth, or along a path made from `seed`."""
    take = plan_take(scene, seed=seed, frames=frames, fps=fps, size=size) if c2w is None else None
    poses = c2w.double() if take is None else take.c2w  # type: ignore[union-attr]
    intrinsics_px = intrinsics_of(size)
    with Camera(scene, size=size, backend=backend) as camera:
        video = torch.from_numpy(np.stack([camera.picture(pose) for pose in poses.numpy()]))
        provenance = {"scene": scene.name, "seed": scene.seed, "engine": ENGINE_VERSION, "backend": camera.backend}
    return Clip(
        video=video,
        c2w=poses,
        intrinsics_px=intrinsics_px,
        fps=fps,
        d_bar=mean_step(poses)[0],
        captions=describe(scene, poses, fps=fps, intrinsics_px=intrinsics_px),
        provenance=provenance,
    )
