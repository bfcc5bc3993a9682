"""Cells of a latent in place of its tokens: what a memory pools, it pools here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from relic.nn.attention import taken
from relic.nn.context import KV, Pool, Rays, Turns
from relic.ops.rope import composed

__all__ = ["pooled", "turns_of"]


def pooled(
    kv: KV, latents: Sequence[int], *, factor: int, layer: int, grid: tuple[int, int], pool: Pool
) -> KV:
    """Pool some latents of a pass over cells: keys and values (b, k, n', d), not turned, latent by latent.

    latents: places in the pass. grid: rows and columns of tokens.
    """
    squares = (_chosen(x, latents, size=grid[0] * grid[1]).unflatten(2, (-1, *grid)) for x in kv)
    return KV(*(x.flatten(2, 4) for x in pool(KV(*squares), factor=factor, layer=layer)))


def turns_of(
    rays: Rays | None, latents: Sequence[int], *, factor: int, of: int, rope: Tensor | None
) -> Turns:
    """Return by which tables the tokens (factor 1) or cells of some latents of a pass are turned.

    of: how many latents the pass has. rope: table (n', 2, d) of their places, None if keys are to be rotated
    later.
    """
    if rays is None:
        return Turns(rope, None)
    table = rays[factor]
    size = table.shape[2] // of
    values = _chosen(table.flatten(3), latents, size=size).unflatten(3, table.shape[3:])
    return Turns(values if rope is None else composed(rope, values), values)


def _chosen(x: Tensor, latents: Sequence[int], *, size: int) -> Tensor:
    """Return the tokens of some latents of (b, k, t·size, d), latent by latent."""
    # no index: it would come from the host, and its backward pass adds up what is sorted
    return taken(x, tuple((i * size, (i + 1) * size) for i in latents), dim=2)
