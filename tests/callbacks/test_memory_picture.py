import numpy as np
import pytest
from PIL import Image

from relic.callbacks.memory_picture import Glance, draw_memory, factor_grid
from relic.ops.retention import SCHEDULE, Compressed, factors_seen, window_start


def glances(policy: Compressed, *, blocks: int = 20) -> list[Glance]:
    return [
        Glance(
            block=block,
            factors=factors_seen(policy, block, block_latents=4),
            first_of_window=window_start(policy, block, block_latents=4),
            first_own=4 * block - 3,
            window=0.25,
            memory=0.5,
            own=0.25,
        )
        for block in range(1, blocks + 1)
    ]


def test_the_grid_holds_the_published_factors():
    grid = factor_grid(glances(Compressed(window=8)))
    assert grid.shape == (20, 81)
    assert tuple(grid[-1, :18]) == SCHEDULE
    assert (grid[-1, -8:] == 1).all() and (grid[0, :5] == 1).all() and (grid[0, 5:] == -1).all()
    assert set(np.unique(grid)) == {-1, 1, 2, 4}


def test_the_picture_shows_what_is_kept_dark_and_what_is_not_kept_white(tmp_path):
    path = tmp_path / "below" / "memory.png"
    draw_memory(glances(Compressed(window=8)), path, title="a memory")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    full, half, quarter = ((51, 107, 92), (110, 152, 140), (170, 196, 187))
    found = [(np.abs(picture - np.array(colour)).max(-1) <= 2).sum() for colour in (full, half, quarter)]
    assert all(count > 500 for count in found), found
    assert found[2] > found[1], "most latents are pooled 4x4"
    assert found[2] > found[0], "and what does not exist yet is white"
    orange, blue = (
        (np.abs(picture - np.array(c)).max(-1) <= 2).sum() for c in ((217, 128, 50), (42, 127, 158))
    )
    assert 1.5 < orange / blue < 3, "half of attention against a quarter, and the outline of the window"


def test_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one generated block"):
        draw_memory([], tmp_path / "memory.png", title="")
