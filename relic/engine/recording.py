"""A path through a scene as a clip: its pictures, captions and where they come from."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from relic.engine.captions import describe
from relic.engine.capture import Backend, Camera, intrinsics_of
from relic.engine.scenes import Scene
from relic.ops.actions import mean_step
from relic.types import Clip

__all__ = ["ENGINE", "film", "provenance_of"]

ENGINE: Final = "relic-engine/3"  # changes whenever the same seed gives other pictures or paths


def film(
    scene: Scene,
    c2w: Tensor,
    *,
    fps: float = 16.0,
    size: tuple[int, int] = (128, 256),
    backend: Backend = "auto",
) -> Clip:
    """Render a clip whole, along a made or scripted path (f, 4, 4) in metres. size: (height, width)."""
    intrinsics_px = intrinsics_of(size)
    with Camera(scene, size=size, backend=backend) as camera:
        pictures = [camera.picture(pose) for pose in c2w.double().numpy()]
        provenance = provenance_of(scene, camera)
    return Clip(
        video=torch.from_numpy(np.stack(pictures)),
        c2w=c2w.double(),
        intrinsics_px=intrinsics_px,
        fps=fps,
        d_bar=mean_step(c2w)[0],
        captions=describe(scene, c2w.double(), fps=fps, intrinsics_px=intrinsics_px),
        provenance=provenance,
    )


def provenance_of(scene: Scene, camera: Camera) -> dict[str, Any]:
    """Say where pictures come from, in plain JSON values."""
    return {
        "scene": scene.name,
        "seed": scene.seed,
        "scene_index": scene.index,
        "engine": ENGINE,
        "backend": camera.backend,
    }
