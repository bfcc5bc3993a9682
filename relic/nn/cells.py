"""Cells of a latent in place of its tokens: what a memory pools, it pools here."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from relic.nn.context import KV, Pool, Rays, Turns
from relic.ops.rope import composed

__all__ = ["places_of", "pooled", "turns_of"]


@cache  # they come from the host, which a recorded pass can't wait for
def places_of(latents: tuple[int, ...], device: torch.device) -> Tensor:
    """Return places of latents in a pass as a tensor (n,) on a device."""
    with torch.inference_mode(False), torch.no_grad():  # they may be first wanted by a sample, then by a fit
        return torch.tensor(latents, device=device)


def pooled(kv: KV, places: Tensor, *, factor: int, layer: int, grid: tuple[int, int], pool: Pool) -> KV:
    """Return some latents of a pass pooled over cells, (b, k, n', d), latent by latent.

    kv: of all its tokens, (b, k, n, d), not turned. places: of the latents in the pass, (t,). grid: rows and
    columns of tokens.
    """
    # pool all, then pick: what is indexed is small then, and compiled code fuses the pooling
    cells = pool(KV(*(x.unflatten(2, (-1, *grid)) for x in kv)), factor=factor, layer=layer)
    return KV(*(x.index_select(2, places).flatten(2, 4) for x in cells))


def turns_of(rays: Rays | None, places: Tensor, *, factor: int, of: int, rope: Tensor | None) -> Turns:
    """Return by which tables the tokens (factor 1) or cells of some latents of a pass are turned.

    places: of the latents in the pass, (n,). of: how many latents the pass has. rope: table (n', 2, d) of
    their places, None if keys are to be rotated later.
    """
    if rays is None:
        return Turns(rope, None)
    values = rays[factor].unflatten(2, (of, -1)).index_select(2, places).flatten(2, 3)
    return Turns(values if rope is None else composed(rope, values), values)
