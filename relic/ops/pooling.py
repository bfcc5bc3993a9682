"""Cells: averaging the tokens of a latent over squares of `factor` x `factor` (paper §4.2).

Cells at the right and lower edge may hold fewer tokens; they average those they hold. A cell sits at the mean
position of its tokens, so positions of pooled keys are fractional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

__all__ = ["cell_counts", "cell_grid", "cell_middles", "cell_positions", "pool_cells"]


def cell_grid(rows: int, columns: int, *, factor: int) -> tuple[int, int]:
    """Return rows and columns of cells, rounded up.

    Raises:
        ValueError: If a cell is larger than the grid.
    """
    if not 1 <= factor <= min(rows, columns):
        raise ValueError(
            f"Pooling by factor {factor} needs a grid of at least {factor}x{factor} tokens, this one has "
            f"{rows}x{columns}; use a schedule with factors from 1 to {min(rows, columns)}."
        )
    return math.ceil(rows / factor), math.ceil(columns / factor)


def cell_counts(rows: int, columns: int, *, factor: int, device: torch.device | str | None = None) -> Tensor:
    """Return how many tokens each cell holds, (rows of cells, columns of cells) float64."""
    high, wide = cell_grid(rows, columns, factor=factor)

    def held(size: int, cells: int) -> Tensor:
        return (size - factor * torch.arange(cells, dtype=torch.float64, device=device)).clamp(max=factor)

    return held(rows, high)[:, None] * held(columns, wide)


def pool_cells(x: Tensor, *, factor: int) -> Tensor:
    """Average tokens (..., h, w, d) over cells -> (..., h', w', d), in float32 or the wider dtype of x."""
    if factor == 1:
        return x
    rows, columns = x.shape[-3:-1]
    high, wide = cell_grid(rows, columns, factor=factor)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not (rows % factor or columns % factor):
        cells = x.unflatten(-3, (high, factor)).unflatten(-2, (wide, factor))  # (..., h', p, w', q, d)
        return cells.mean((-4, -2), dtype=dtype).to(x.dtype)
    padded = F.pad(x.to(dtype), (0, 0, 0, wide * factor - columns, 0, high * factor - rows))
    total = rearrange(padded, "... (h p) (w q) d -> ... h w (p q) d", p=factor, q=factor).sum(-2)
    counts = cell_counts(rows, columns, factor=factor, device=x.device).to(dtype)
    return (total / counts[..., None]).to(x.dtype)


def cell_middles(size: int, *, factor: int) -> tuple[float, ...]:
    """Return the mean place of the tokens of each cell along a side of `size` tokens."""
    starts = range(0, size, factor)
    return tuple((start + min(start + factor, size) - 1) / 2 for start in starts)


def cell_positions(times: Sequence[int], rows: int, columns: int, *, factor: int = 1) -> Tensor:
    """Return the positions (n, 3) of the cells of latents at `times`: time, then mean row, then mean column.

    float64. Factor 1 gives the positions of the tokens themselves.
    """
    cell_grid(rows, columns, factor=factor)
    sides = tuple(times), cell_middles(rows, factor=factor), cell_middles(columns, factor=factor)
    axes = torch.meshgrid(*(torch.tensor(side, dtype=torch.float64) for side in sides), indexing="ij")
    return rearrange(torch.stack(axes, dim=-1), "t h w a -> (t h w) a")
