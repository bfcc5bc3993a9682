"""Rotary tables over (time, row, column), at any positions, with YaRN on the time axis.

Layout as in Wan2.1: inside a head, the first `d − 4·(d // 6)` channels turn with time, then `2·(d // 6)` with
the row and `2·(d // 6)` with the column; channels 2j and 2j+1 are a pair; base 10000 on each axis. Tables are
built in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from relic.ops.pooling import cell_grid, cell_middles

__all__ = ["apply_rope", "axis_widths", "grid_table", "rope_table", "yarn_frequencies"]

BASE = 10_000.0
TRAINED_LATENTS = 21  # the horizon Wan2.1 was trained at
BETA_FAST, BETA_SLOW = 32.0, 1.0


def axis_widths(head_width: int) -> tuple[int, int, int]:
    """Return how many channels of a head turn with time, row and column: 44, 42, 42 for 128."""
    side = 2 * (head_width // 6)
    return head_width - 2 * side, side, side


def yarn_frequencies(width: int, *, factor: float = 1.0) -> Tensor:
    """Return the `width / 2` angular frequencies of an axis stretched `factor` times (YaRN, NTK-by-parts),
    float64.

    Pairs that turn more than 32 times within the trained 21 latents keep their frequency, those that turn
    less than once are divided by `factor`, and a linear ramp joins them. The temperature is 1. `factor = 1`
    is the plain table.
    """
    pair = torch.arange(width // 2, dtype=torch.float64)
    plain = BASE ** (-2.0 * pair / width)
    if factor == 1.0:
        return plain

    def pair_that_turns(times: float) -> float:
        return width * math.log(TRAINED_LATENTS / (2 * math.pi * times)) / (2 * math.log(BASE))

    low = max(math.floor(pair_that_turns(BETA_FAST)), 0)
    high = min(math.ceil(pair_that_turns(BETA_SLOW)), width - 1)
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain * ((1 - ramp) + ramp / factor)


def rope_table(positions: Tensor, *, head_width: int, factor: float = 1.0) -> Tensor:
    """Return the table (n, 2, d) of positions (n, 3), integer or fractional: cos of each channel, and its
    sin, negative in even channels, float64.

    Fractional positions are for pooled keys, which sit at the mean position of their cell.
    """
    tables = [
        _turned(positions[:, axis], width, factor=factor if axis == 0 else 1.0)
        for axis, width in enumerate(axis_widths(head_width))
    ]
    return torch.cat(tables, dim=-1)


def grid_table(
    times: Sequence[int],
    rows: int,
    columns: int,
    *,
    head_width: int,
    factor: float = 1.0,
    cells: int = 1,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the table (n, 2, d) of all tokens of latents at `times`, or of their cells of `cells` a side.

    The same numbers as `rope_table` of `cell_positions`. The tables of the three axes wait on the device, so
    that a pass copies nothing to it.
    """
    cell_grid(rows, columns, factor=cells)
    sides = tuple(times), cell_middles(rows, factor=cells), cell_middles(columns, factor=cells)
    sizes, parts = [len(side) for side in sides], []
    for axis, (side, width) in enumerate(zip(sides, axis_widths(head_width), strict=True)):
        yarn = factor if axis == 0 else 1.0
        part = _axis_table(side, width, factor=yarn, dtype=dtype, device=torch.device(device))
        place = [1, 1, 1]
        place[axis] = sizes[axis]
        parts.append(part.view(*place, 2, width).expand(*sizes, -1, -1))
    return torch.cat(parts, dim=-1).flatten(0, 2)


@lru_cache(maxsize=512)
def _axis_table(
    places: tuple[float, ...], width: int, *, factor: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the table (n, 2, width) of one axis."""
    with torch.inference_mode(False), torch.no_grad():  # it may be first wanted by a sample, then by a fit
        return _turned(torch.tensor(places), width, factor=factor).to(device, dtype)


def _turned(places: Tensor, width: int, *, factor: float) -> Tensor:
    """Return cos and signed sin (n, 2, width) of places (n,) along an axis."""
    angle = places.double()[:, None] * yarn_frequencies(width, factor=factor).to(places.device)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, cos], dim=-1), torch.stack([-sin, sin], dim=-1)], dim=1).flatten(2)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys (..., n, d) by table (..., n, 2, d), in float32 or the wider dtype of x.

    Written as x·cos + swap(x)·sin: few passes over memory when run as it stands, one when compiled.
    """
    cos, sin = table.to(torch.promote_types(x.dtype, torch.float32)).unbind(-2)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
