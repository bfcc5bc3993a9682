"""What a memory pools: contents are averaged, and turned where their cell is and looks."""

from __future__ import annotations

import pytest
import torch

from relic.nn.cells import pooled, turns_of
from relic.nn.context import KV
from relic.nn.memory import MeanPool
from relic.ops.pooling import cell_grid, pool_cells
from relic.ops.rope import apply_rope, ray_table, rope_table, turn_heads
from tests.nn.streams import COLUMNS, ROWS, normal

GRID, TOKENS, LATENTS = (ROWS, COLUMNS), ROWS * COLUMNS, 3


def rays_of(*, factor: int):
    """Tables of two shells over three latents, of tokens and of cells, that look anywhere."""
    high, wide = cell_grid(ROWS, COLUMNS, factor=factor)
    sizes = {1: TOKENS, factor: high * wide}
    return {f: ray_table(normal(1, 2, LATENTS * n, 3, seed=10 + f), head_width=12) for f, n in sizes.items()}


@pytest.mark.parametrize("factor", [2, 3])
def test_tokens_are_averaged_latent_by_latent(factor):
    kv = KV(normal(2, 4, LATENTS * TOKENS, 12), normal(2, 4, LATENTS * TOKENS, 12, seed=2))
    cells = pooled(kv, torch.tensor([2, 0]), factor=factor, layer=0, grid=GRID, pool=MeanPool())
    for got, x in zip(cells, kv, strict=True):
        squares = x.unflatten(2, (LATENTS, *GRID))
        expected = torch.cat(
            [pool_cells(squares[:, :, i], factor=factor).flatten(2, 3) for i in (2, 0)], dim=2
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("factor", [1, 2])
def test_cells_are_turned_by_rays_of_their_own_and_keys_by_their_places_too(factor):
    rays = rays_of(factor=2)
    size = rays[factor].shape[2] // LATENTS
    rope = rope_table(normal(2 * size, 3, seed=3), head_width=12)
    places = torch.tensor([1, 2])
    held = KV(normal(1, 4, 2 * size, 12), normal(1, 4, 2 * size, 12, seed=2))
    turned = turns_of(rays, places, factor=factor, of=LATENTS, rope=rope)(held)
    table = rays[factor][:, :, size:]  # of the last two latents
    torch.testing.assert_close(turned.k, apply_rope(turn_heads(held.k, table), rope))
    torch.testing.assert_close(turned.v, turn_heads(held.v, table))
    later = turns_of(rays, places, factor=factor, of=LATENTS, rope=None)(held)
    torch.testing.assert_close(later.k, turn_heads(held.k, table))
    plain = turns_of(None, places, factor=factor, of=LATENTS, rope=rope)(held)
    torch.testing.assert_close(plain.k, apply_rope(held.k, rope))
    assert plain.v is held.v
