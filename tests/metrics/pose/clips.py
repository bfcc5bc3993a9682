"""Short engine clips with commanded motion, for tests of pose estimators."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from relic.engine import Camera, intrinsics_of, make_scene, make_trajectory
from relic.ops.actions import integrate, parse_script
from relic.types import Clip

SIZE = (128, 256)


@lru_cache
def clip(script: str, *, scene: int = 0, step: float = 0.04) -> Clip:
    """Film a script, steps in metres, from the place where the engine's own path begins."""
    world = make_scene(77, scene)
    start = make_trajectory(world, seed=scene, frames=1)[0]
    c2w = start @ integrate(parse_script(script), d_bar=step)
    with Camera(world, size=SIZE, backend="software") as camera:
        video = torch.from_numpy(np.stack([camera.picture(pose) for pose in c2w.numpy()]))
    return Clip(video=video, c2w=c2w, intrinsics_px=intrinsics_of(SIZE), fps=16.0, d_bar=step)
