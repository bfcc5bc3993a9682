import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relic.ops.pooling import cell_positions
from relic.ops.rope import (
    _axis_table,
    apply_rope,
    axis_widths,
    composed,
    grid_table,
    ray_table,
    rope_table,
    turn_heads,
    yarn_frequencies,
)


def test_a_head_of_128_splits_into_44_42_42():
    assert axis_widths(128) == (44, 42, 42)


def test_factor_one_is_the_plain_table():
    plain = 10_000.0 ** (-2 * torch.arange(22, dtype=torch.float64) / 44)
    assert torch.equal(yarn_frequencies(44), plain)
    assert torch.equal(yarn_frequencies(44, factor=1.0), plain)


def test_yarn_over_81_latents_keeps_the_fastest_pair_and_divides_all_but_three():
    kept = yarn_frequencies(44, factor=81 / 21) / yarn_frequencies(44)
    share = (kept - 21 / 81) / (1 - 21 / 81)  # 1: kept, 0: divided
    expected = torch.tensor([1.0, 2 / 3, 1 / 3] + [0.0] * 19, dtype=torch.float64)
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-12)


def test_only_the_time_axis_is_stretched():
    positions = cell_positions(range(2), 3, 3)
    plain, stretched = (rope_table(positions, head_width=48, factor=f) for f in (1.0, 3.0))
    time = axis_widths(48)[0]
    assert torch.equal(plain[..., time:], stretched[..., time:])
    assert not torch.equal(plain[..., :time], stretched[..., :time])


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(-500, 500))
def test_scores_depend_on_distance_alone(a, b, offset):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 24, generator=generator, dtype=torch.float64) for _ in range(2))

    def score(x, y):
        at = lambda t: rope_table(torch.tensor([[t, 0, 0]]), head_width=24)  # noqa: E731
        return (apply_rope(q, at(x)) * apply_rope(k, at(y))).sum()

    assert abs(score(a, b) - score(a + offset, b + offset)) < 1e-9


def test_fractional_positions_lie_between_their_neighbours():
    table = rope_table(torch.tensor([[0.0, 0.5, 0.0]]), head_width=24)
    time, rows, _ = axis_widths(24)
    assert rows > 0 and torch.allclose(table[0, 0, time : time + 2], torch.tensor(0.5).double().cos())
    sin = math.sin(0.5)
    assert torch.allclose(table[0, 1, time : time + 2], torch.tensor([-sin, sin], dtype=torch.float64))


@pytest.mark.parametrize("cells", [1, 2, 3])
def test_the_table_of_a_grid_is_that_of_its_positions(cells):
    times, sizes = (0, 3, 4), {"head_width": 48, "factor": 81 / 21}
    expected = rope_table(cell_positions(times, 5, 7, factor=cells), **sizes)
    assert torch.equal(grid_table(times, 5, 7, cells=cells, **sizes), expected)
    rounded = grid_table(times, 5, 7, cells=cells, dtype=torch.float32, **sizes)
    assert torch.equal(rounded, expected.float())


def test_times_far_on_and_out_of_order_have_their_rows():
    times = (126, 127, 128, 300, 5, 4)
    expected = rope_table(cell_positions(times, 2, 3), head_width=24)
    assert torch.equal(grid_table(times, 2, 3, head_width=24), expected)
    known = _axis_table.cache_info().currsize
    for start in range(384, 384 + 128, 4):  # a stream goes on
        grid_table(range(start, start + 4), 2, 3, head_width=24)
    assert _axis_table.cache_info().currsize == known + 1


def test_a_table_first_wanted_by_a_sample_can_be_trained_with():
    with torch.inference_mode():
        grid_table((911,), 2, 2, head_width=24)
    x = torch.ones(1, 1, 4, 24, dtype=torch.float64, requires_grad=True)
    apply_rope(x, grid_table((911,), 2, 2, head_width=24)).sum().backward()
    assert x.grad is not None


def test_rays_turn_what_places_hardly_turn_each_coordinate_its_share():
    table = ray_table(torch.eye(3, dtype=torch.float64), head_width=64)
    turned = table[:, 1].abs().unflatten(-1, (-1, 2))[..., 0] > 0  # (3 coordinates, pairs)
    assert turned.sum(1).tolist() == [7, 7, 7] and turned.sum(0).max() == 1
    speeds = torch.cat([yarn_frequencies(width) for width in axis_widths(64)])
    assert (speeds[turned.any(0)] < 1 / 8).all()
    angles = torch.atan2(table[0, 1, 1::2], table[0, 0, ::2])[turned[0]]
    torch.testing.assert_close(angles[:3], 16 ** (torch.arange(3.0, dtype=torch.float64) / 6))


def test_rotations_by_rays_and_by_places_add_up_and_can_be_undone():
    torch.manual_seed(0)
    x, points = torch.randn(5, 24).double(), torch.randn(5, 3).double()
    rays, places = ray_table(points, head_width=24), rope_table(torch.rand(5, 3) * 9, head_width=24)
    torch.testing.assert_close(
        apply_rope(apply_rope(x, rays), places), apply_rope(apply_rope(x, places), rays)
    )
    torch.testing.assert_close(apply_rope(apply_rope(x, rays), rays, back=True), x)
    torch.testing.assert_close(apply_rope(x, composed(places, rays)), apply_rope(apply_rope(x, rays), places))


def test_kinds_of_heads_come_in_turn():
    tables = ray_table(torch.rand(2, 3, 5, 3), head_width=24)  # three kinds
    x = torch.rand(2, 6, 5, 24)
    turned = turn_heads(x, tables)
    for head in range(6):
        torch.testing.assert_close(turned[:, head], apply_rope(x[:, head], tables[:, head % 3]))
    torch.testing.assert_close(turn_heads(turned, tables, back=True), x)
    torch.testing.assert_close(turn_heads(x, tables[0, 0]), apply_rope(x, tables[0, 0]))
