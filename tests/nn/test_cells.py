"""What a memory pools: contents are averaged, and look where their cell looks."""

from __future__ import annotations

import pytest
import torch

from relic.nn.cells import pooled
from relic.nn.context import FreshKV
from relic.nn.control import turn_heads
from relic.nn.memory import MeanPool
from relic.ops.pooling import cell_grid, pool_cells
from relic.ops.rope import ray_table
from tests.nn.streams import COLUMNS, ROWS, normal

GRID, TOKENS, LATENTS = (ROWS, COLUMNS), ROWS * COLUMNS, 3


def rays_of(*, factor: int):
    """Tables of two shells over three latents, of tokens and of cells, that look anywhere."""
    high, wide = cell_grid(ROWS, COLUMNS, factor=factor)
    sizes = {1: TOKENS, factor: high * wide}
    return {f: ray_table(normal(1, 2, LATENTS * n, 3, seed=10 + f), head_width=12) for f, n in sizes.items()}


def over(fresh: FreshKV, latents, *, factor: int):
    return pooled(fresh, latents, factor=factor, layer=0, grid=GRID, pool=MeanPool())


@pytest.mark.parametrize("factor", [2, 3])
def test_without_rays_tokens_are_averaged_latent_by_latent(factor):
    k, v = normal(2, 4, LATENTS * TOKENS, 12), normal(2, 4, LATENTS * TOKENS, 12, seed=2)
    cells = over(FreshKV(k, v), [2, 0], factor=factor)
    for got, x in zip(cells, (k, v), strict=True):
        squares = x.unflatten(2, (LATENTS, *GRID))
        expected = torch.cat(
            [pool_cells(squares[:, :, i], factor=factor).flatten(2, 3) for i in (2, 0)], dim=2
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("factor", [2, 3])
def test_what_all_tokens_hold_a_cell_holds_too_wherever_they_look(factor):
    rays, held = rays_of(factor=factor), normal(1, 4, 1, 12)
    tokens = held.expand(-1, -1, LATENTS * TOKENS, -1)
    fresh = FreshKV(turn_heads(tokens, rays[1]), turn_heads(2 * tokens, rays[1]), rays)
    cells = over(fresh, [1, 2], factor=factor)
    size = cells.k.shape[2] // 2
    table = rays[factor][:, :, size:]
    everywhere = held.expand(-1, -1, 2 * size, -1)
    torch.testing.assert_close(cells.k, turn_heads(everywhere, table))
    torch.testing.assert_close(cells.v, turn_heads(2 * everywhere, table))
    averaged = over(fresh._replace(rays=None), [1, 2], factor=factor)  # what they hold is lost without
    assert (averaged.v.norm(dim=-1) < 0.95 * cells.v.norm(dim=-1)).any()
