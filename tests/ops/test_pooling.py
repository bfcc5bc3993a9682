import pytest
import torch

from relic.ops.pooling import cell_counts, cell_grid, cell_positions, pool_cells


def test_thirty_rows_make_eight_rows_of_cells():
    assert cell_grid(30, 52, factor=4) == (8, 13) and cell_grid(30, 52, factor=2) == (15, 26)


def test_cells_at_the_edge_average_the_tokens_they_hold():
    x = torch.arange(15.0).reshape(3, 5, 1)
    assert pool_cells(x, factor=2)[..., 0].tolist() == [[3, 5, 6.5], [10.5, 12.5, 14]]
    assert cell_counts(3, 5, factor=2).tolist() == [[4, 4, 2], [2, 2, 1]]


def test_whole_cells_are_averaged_as_ragged_ones_are():
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    ragged = torch.cat([x, torch.zeros(2, 1, 6, 3)], dim=1)  # a row of cells more
    torch.testing.assert_close(pool_cells(x, factor=2), pool_cells(ragged, factor=2)[:, :2])


def test_factor_one_changes_nothing():
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(pool_cells(x, factor=1), x)


def test_positions_run_frame_then_row_then_column():
    positions = cell_positions([5, 6], 2, 3)
    assert positions[0].tolist() == [5, 0, 0] and positions[1].tolist() == [5, 0, 1]
    assert positions[3].tolist() == [5, 1, 0] and positions[6].tolist() == [6, 0, 0]


def test_cells_sit_at_the_mean_position_of_their_tokens():
    tokens = cell_positions([3, 7], 3, 5)
    assert tokens.shape == (30, 3) and tokens[16].tolist() == [7, 0, 1]
    grid = tokens[:15, 1:].reshape(3, 5, 2)
    cells = cell_positions([3], 3, 5, factor=2)
    torch.testing.assert_close(cells[:, 1:], pool_cells(grid, factor=2).reshape(-1, 2))
    assert cells[:, 0].tolist() == [3.0] * 6 and cells[0].tolist() == [3, 0.5, 0.5]


def test_half_precision_is_averaged_in_single():
    x = torch.full((64, 64, 1), 1.001).bfloat16()
    assert pool_cells(x, factor=64).item() == x[0, 0, 0].item()


def test_a_cell_larger_than_the_grid_is_refused():
    with pytest.raises(ValueError, match="factor 4 needs a grid of at least 4x4 tokens, this one has 3x5"):
        cell_grid(3, 5, factor=4)
