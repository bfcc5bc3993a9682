"""How much of what one camera sees others see: frustum overlap, from poses alone.

Depth is not known, so points are spread through a camera's view, at a few distances in units of d̄ (a step;
rooms are some 10 to 100 steps wide), and it is asked where they fall into other cameras' pictures.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from relic.ops.camera import invert_rigid

__all__ = ["frustum_overlap", "redundancy"]

DEPTHS = (8.0, 16.0, 32.0, 64.0, 128.0)  # d̄
CELLS = (8, 6)  # points of each distance, across and down
COARSE_DEPTHS, COARSE = (8.0, 32.0, 128.0), (6, 4)  # where all views are compared with all
NEAR = 1e-6
BESIDE = 2  # cameras by which a view is called shown


def redundancy(c2w: Tensor, *, reach: tuple[float, float]) -> Tensor:
    """Return how well others show the view of each camera c2w (n, 4, 4): the mean share that the two show
    which show most of it, as (n,) in [0, 1].

    Two, so that of cameras in a row the one between others counts as shown, and not the one at a gap.

    A point of a view that another camera sees counts by the cosine between their lines of sight, and less if
    that camera is further away, by the ratio: so an equal pose shows all of a view, and one that looks back
    at it from the other side nothing. reach and units: see `frustum_overlap`.
    """
    poses = c2w.double().cpu()
    places = poses[:, :3, 3]
    points = (
        _points(reach, depths=COARSE_DEPTHS, cells=COARSE) @ poses[:, :3, :3].mT + places[:, None]
    )  # (n, p, 3): the views of all
    sight = points - places[:, None, None]  # (n, n, p, 3): camera, view
    own = torch.einsum("iipa->ipa", sight)
    distance, near = sight.norm(dim=-1), own.norm(dim=-1)
    cosine = (sight * own).sum(-1) / (distance * near).clamp(min=NEAR)
    inside = _within(sight @ poses[:, None, :3, :3], reach=reach)
    shown = inside * cosine.clamp(min=0) * (near / distance.clamp(min=NEAR)).clamp(max=1)
    shares = shown.mean(-1)
    shares.diagonal().zero_()
    return shares.topk(min(BESIDE, len(shares)), dim=0).values.sum(0) / BESIDE


def frustum_overlap(c2w: Tensor, current: Tensor, *, reach: tuple[float, float]) -> Tensor:
    """Return the share (n,) in [0, 1] of the view of `current` (4, 4) that cameras c2w (n, 4, 4) see, too.

    reach: half the width and half the height of the picture, in focal lengths (1 is a 90° view). Translations
    are in d̄.
    """
    current, others = current.double().cpu(), invert_rigid(c2w.double().cpu())
    world = _points(reach) @ current[:3, :3].mT + current[:3, 3]
    return _inside(world @ others[:, :3, :3].mT + others[:, None, :3, 3], reach=reach).mean(-1)


def _points(
    reach: tuple[float, float],
    *,
    depths: tuple[float, ...] = DEPTHS,
    cells: tuple[int, int] = CELLS,
) -> Tensor:
    """Return points (p, 3) of a camera's view, in its own axes."""
    x, y = (
        size * (2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count - 1)
        for size, count in zip(reach, cells, strict=True)
    )
    z = torch.tensor(depths, dtype=torch.float64)
    grid = torch.meshgrid(z, y, x, indexing="ij")
    return rearrange(torch.stack([grid[2] * grid[0], grid[1] * grid[0], grid[0]], -1), "z y x a -> (z y x) a")


def _within(points: Tensor, *, reach: tuple[float, float]) -> Tensor:
    """Return how much of the cells round points (..., 3) of the coarse grid is in a camera's picture, [0, 1]:
    without steps, so that small turns tell views apart.
    """
    depth = points[..., 2]
    size = torch.tensor(reach, dtype=torch.float64)
    cells = 2 * size / torch.tensor(COARSE, dtype=torch.float64)
    flat = points[..., :2].abs() / depth.clamp(min=NEAR)[..., None]
    return (depth > NEAR) * ((size - flat) / cells + 0.5).clamp(0, 1).prod(-1)


def _inside(points: Tensor, *, reach: tuple[float, float]) -> Tensor:
    """Return 1 where points (..., 3), in a camera's axes, are in its picture, else 0."""
    depth = points[..., 2]
    flat = points[..., :2].abs() / depth.clamp(min=NEAR)[..., None]
    return ((depth > NEAR) & (flat[..., 0] <= reach[0]) & (flat[..., 1] <= reach[1])).double()
