"""How much of what one camera sees another one sees: frustum overlap, from poses alone.

Depth is not known, so points are spread through the view of the current camera, at a few distances in units
of d̄ (a step; rooms are some 10 to 100 steps wide), and counted where they fall into the other camera's
picture.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from relic.ops.camera import invert_rigid

__all__ = ["frustum_overlap"]

DEPTHS = (8.0, 16.0, 32.0, 64.0, 128.0)  # d̄
ACROSS, DOWN = 8, 6  # points of each distance
NEAR = 1e-6


def frustum_overlap(c2w: Tensor, current: Tensor, *, reach: tuple[float, float]) -> Tensor:
    """Return the share (n,) in [0, 1] of the view of `current` (4, 4) that cameras c2w (n, 4, 4) see, too.

    reach: half the width and half the height of the picture, in focal lengths (1 is a 90° view). Translations
    are in d̄.
    """
    x = reach[0] * (2 * (torch.arange(ACROSS, dtype=torch.float64) + 0.5) / ACROSS - 1)
    y = reach[1] * (2 * (torch.arange(DOWN, dtype=torch.float64) + 0.5) / DOWN - 1)
    z = torch.tensor(DEPTHS, dtype=torch.float64)
    grid = torch.meshgrid(z, y, x, indexing="ij")
    rays = rearrange(torch.stack([grid[2] * grid[0], grid[1] * grid[0], grid[0]], -1), "z y x a -> (z y x) a")
    current, others = current.double().cpu(), invert_rigid(c2w.double().cpu())
    world = rays @ current[:3, :3].mT + current[:3, 3]
    seen = world @ others[:, :3, :3].mT + others[:, None, :3, 3]
    depth = seen[..., 2]
    flat = seen[..., :2].abs() / depth.clamp(min=NEAR)[..., None]
    inside = (depth > NEAR) & (flat[..., 0] <= reach[0]) & (flat[..., 1] <= reach[1])
    return inside.double().mean(-1)
