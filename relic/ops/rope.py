"""Rotary tables over (time, row, column), at any positions, with YaRN on the time axis.

Layout as in Wan2.1: inside a head, the first `d − 4·(d // 6)` channels turn with time, then `2·(d // 6)` with
the row and `2·(d // 6)` with the column; channels 2j and 2j+1 are a pair; base 10000 on each axis. Tables are
built in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from relic.ops.pooling import cell_grid, cell_middles

__all__ = [
    "apply_rope",
    "axis_widths",
    "composed",
    "grid_table",
    "ray_table",
    "rope_table",
    "turn_heads",
    "yarn_frequencies",
]

BASE = 10_000.0
TRAINED_LATENTS = 21  # the horizon Wan2.1 was trained at
BETA_FAST, BETA_SLOW = 32.0, 1.0
SLOW = 1 / 8  # radians a place: pairs of channels that turn less are free for rays
RAY_FASTEST = 16.0  # radians a unit
STRETCH = 128  # latents of which tables are made at once


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
    widths, kind = axis_widths(head_width), (dtype, torch.device(device))
    along = _time_table(times, widths[0], factor, *kind)
    down = _axis_table(cell_middles(rows, factor=cells), widths[1], 1.0, *kind)
    across = _axis_table(cell_middles(columns, factor=cells), widths[2], 1.0, *kind)
    sizes = len(along), len(down), len(across), -1, -1
    parts = along[:, None, None], down[None, :, None], across[None, None]
    return torch.cat([part.expand(sizes) for part in parts], dim=-1).flatten(0, 2)


def _time_table(
    times: Sequence[int], width: int, factor: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the table (n, 2, width) of latents, cut from tables of long stretches: a stream without an end
    asks for other times at every block.
    """
    pieces = []
    for run in _runs(times):
        start = run.start - run.start % STRETCH
        table = _axis_table(tuple(range(start, start + STRETCH)), width, factor, dtype, device)
        pieces.append(table[run.start - start : run.stop - start])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _runs(times: Sequence[int]) -> list[range]:
    """Return times as ranges, none of which goes on from one stretch into the next."""
    runs: list[range] = []
    for time in times:
        if runs and runs[-1].stop == time and time % STRETCH:
            runs[-1] = range(runs[-1].start, time + 1)
        else:
            runs.append(range(time, time + 1))
    return runs


@cache  # never given up: what was recorded reads a table where it is
def _axis_table(
    places: tuple[float, ...], width: int, factor: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the table (n, 2, width) of one axis."""
    with torch.inference_mode(False), torch.no_grad():  # it may be first wanted by a sample, then by a fit
        at = torch.tensor(places, dtype=torch.float64, device="cpu")
        return _turned(at, width, factor=factor).to(device, dtype)


def _turned(places: Tensor, width: int, *, factor: float) -> Tensor:
    """Return cos and signed sin (n, 2, width) of places (n,) along an axis."""
    return _table(places.double()[:, None] * yarn_frequencies(width, factor=factor).to(places.device))


def _table(angle: Tensor) -> Tensor:
    """Return the table (..., 2, d) of angles (..., d / 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, cos, -sin, sin], dim=-1).unflatten(-1, (2, 2)).movedim(-2, -3).flatten(-2)


def ray_table(points: Tensor, *, head_width: int) -> Tensor:
    """Return the table (..., n, 2, d) of points (..., n, 3) that tokens look at.

    The pairs of channels that places turn by less than 1/8 rad each are turned by the coordinates, at
    frequencies from 1 to 16 rad a unit; the others stay. Rotations by this table and by places add up.

    Raises:
        ValueError: If a head has too few channels.
    """
    waves = _ray_waves(head_width, points.dtype, points.device)
    angle = (points[..., None] * waves).sum(-2)  # not a matrix product, which autocast would round
    return _table(angle)


@cache  # as tables of places
def _ray_waves(head_width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return how fast each pair of channels of a head turns with each coordinate, (3, d / 2)."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():  # a network may be built on meta
        speeds = torch.cat([yarn_frequencies(width) for width in axis_widths(head_width)])
        slow = (speeds < SLOW).nonzero()[:, 0]
        count = len(slow) // 3
        if not count:
            raise ValueError(
                f"Heads of width {head_width} have no channels to spare for rays; make them at least 12 "
                "wide, or leave rays out."
            )
        frequencies = RAY_FASTEST ** torch.linspace(0, 1, count, dtype=torch.float64)
        waves = torch.zeros(3, head_width // 2, dtype=torch.float64)
        for axis in range(3):
            waves[axis, slow[axis : 3 * count : 3]] = frequencies
        return waves.to(device, dtype)


def composed(a: Tensor, b: Tensor) -> Tensor:
    """Return the table of turning by both tables (..., n, 2, d), whose leading sizes may be broadcast."""
    (cos, sin), (cosine, sine) = a.unbind(-2), b.unbind(-2)
    return torch.stack([cos * cosine - sin * sine, sin * cosine + cos * sine], dim=-2)


def turn_heads(x: Tensor, table: Tensor, *, back: bool = False) -> Tensor:
    """Turn what heads hold, (b, k, n, d), by the table of their tokens, or back: one of all heads (n, 2, d),
    or of z kinds of heads that come in turn (b, z, n, 2, d).
    """
    if table.ndim == 3:
        return apply_rope(x, table, back=back)
    return apply_rope(x.unflatten(1, (-1, table.shape[1])), table[:, None], back=back).flatten(1, 2)


def apply_rope(x: Tensor, table: Tensor, *, back: bool = False) -> Tensor:
    """Rotate queries or keys (..., n, d) by table (..., n, 2, d), or back, in float32 or the wider dtype of
    x.

    Written as x·cos + swap(x)·sin: few passes over memory when run as it stands, one when compiled.
    """
    cos, sin = table.to(torch.promote_types(x.dtype, torch.float32)).unbind(-2)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin, value=-1 if back else 1).to(x.dtype)
