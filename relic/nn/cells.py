"""Cells of a latent in place of its tokens: what a memory pools, it pools here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relic.nn.context import KV, FreshKV, Pool
from relic.nn.control import turn_heads

__all__ = ["pooled"]


def pooled(
    fresh: FreshKV, latents: Sequence[int], *, factor: int, layer: int, grid: tuple[int, int], pool: Pool
) -> KV:
    """Pool some latents of a pass over cells: keys before RoPE and values, (b, k, n', d), latent by latent.

    Cells average what their tokens hold, not where these look: what rays turned is turned back before, and on
    by the cells' own rays after, as keys are rotated to the place of their cell.

    latents: places in the pass. grid: rows and columns of tokens.
    """
    tokens = grid[0] * grid[1]
    k, v = (_chosen(x, latents, size=tokens) for x in fresh[:2])
    if fresh.rays is None:
        return _over_cells(k, v, factor=factor, layer=layer, grid=grid, pool=pool)
    table = fresh.rays[1]
    held = _chosen(table.flatten(3), latents, size=tokens).unflatten(3, table.shape[3:])
    k, v = (turn_heads(x, held, back=True) for x in (k, v))
    cells = _over_cells(k, v, factor=factor, layer=layer, grid=grid, pool=pool)
    table = fresh.rays[factor]
    size = cells.k.shape[2] // len(latents)
    theirs = _chosen(table.flatten(3), latents, size=size).unflatten(3, table.shape[3:])
    return KV(*(turn_heads(x, theirs) for x in cells))


def _chosen(x: Tensor, latents: Sequence[int], *, size: int) -> Tensor:
    """Return the tokens of some latents of (b, k, t·size, d), latent by latent."""
    # one by one: an index would come from the host, and its backward pass adds up what is sorted
    every = x.unflatten(2, (-1, size)).unbind(2)
    return torch.cat([every[i] for i in latents], dim=2)


def _over_cells(k: Tensor, v: Tensor, *, factor: int, layer: int, grid: tuple[int, int], pool: Pool) -> KV:
    squares = (x.unflatten(2, (-1, *grid)) for x in (k, v))
    return KV(*(x.flatten(2, 4) for x in pool(KV(*squares), factor=factor, layer=layer)))
