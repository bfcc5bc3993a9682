"""A picture of a stream's memory: what each block sees of every latent, and where its attention goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["Glance", "draw_memory", "factor_grid"]

INK, MUTED = "#22303c", "#6b7c8c"
WINDOW, MEMORY, OWN = "#2a7f9e", "#d98032", "#b9c4cc"
COARSEST = 8  # factor at which shades end
NOTHING = (1.0, 1.0, 1.0)


class Glance(NamedTuple):
    """What one block sees.

    block: Its index. factors: of every latent up to its end, 0 not kept, 1 in full, else pooled by that
    factor a side (`relic.ops.retention.factors_seen`). first_of_window, first_own: where the window and the
    block start. window, memory, own: shares of attention, summing to 1.
    """

    block: int
    factors: tuple[int, ...]
    first_of_window: int
    first_own: int
    window: float
    memory: float
    own: float


def factor_grid(glances: Sequence[Glance]) -> np.ndarray:
    """Return the factors as an array (blocks, latents); -1 where a latent does not exist yet."""
    latents = max(len(glance.factors) for glance in glances)
    grid = np.full((len(glances), latents), -1)
    for row, glance in enumerate(glances):
        grid[row, : len(glance.factors)] = glance.factors
    return grid


def draw_memory(glances: Sequence[Glance], path: Path, *, title: str) -> None:
    """Draw the glances of a stream, a row a block: latents kept and by which factor, and shares of attention.

    Raises:
        ValueError: If there is no glance.
    """
    if not glances:
        raise ValueError("A picture of a memory needs at least one generated block.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    grid = factor_grid(glances)
    shown = sorted({int(factor) for factor in np.unique(grid) if factor > 0})
    colours = [NOTHING, *(_shade(factor) for factor in shown)]
    places = np.searchsorted(shown, grid) + 1
    places[grid <= 0] = 0

    height = 1.9 + 0.22 * min(len(glances), 60)
    figure = Figure(figsize=(13, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 1], sharey=True)
    rows = [glance.block for glance in glances]
    extent = (-0.5, grid.shape[1] - 0.5, len(glances) - 0.5, -0.5)
    norm = BoundaryNorm(np.arange(len(colours) + 1) - 0.5, len(colours))
    left.imshow(places, cmap=ListedColormap(colours), norm=norm, aspect="auto", extent=extent,
                interpolation="nearest")  # fmt: skip
    for row, glance in enumerate(glances):
        span = len(glance.factors) - glance.first_of_window
        box = {"height": 0.9, "fill": False, "linewidth": 1.2}
        left.barh(row, span, left=glance.first_of_window - 0.5, edgecolor=WINDOW, **box)
        left.barh(
            row, len(glance.factors) - glance.first_own, left=glance.first_own - 0.5, edgecolor=INK, **box
        )
    entries = [
        Patch(facecolor=_shade(factor), label="in full" if factor == 1 else f"{factor}x{factor} to one")
        for factor in shown
    ]
    entries += [
        Patch(facecolor="none", edgecolor=WINDOW, label="window"),
        Patch(facecolor="none", edgecolor=INK, label="the block itself"),
    ]
    left.legend(handles=entries, ncols=len(entries), fontsize=8, frameon=False, loc="lower left",
                bbox_to_anchor=(0, 1.0))  # fmt: skip
    left.set_xlabel("latent", color=MUTED)
    left.set_ylabel("block", color=MUTED)
    step = max(1, len(rows) // 30)
    left.set_yticks(range(0, len(rows), step), [str(row) for row in rows[::step]])

    start = np.zeros(len(glances))
    for name, colour in (("memory", MEMORY), ("window", WINDOW), ("own", OWN)):
        share = np.array([getattr(glance, name) for glance in glances])
        label = {"own": "itself", "window": "rest of the window"}.get(name, name)
        right.barh(range(len(glances)), share, left=start, height=0.9, color=colour, label=label)
        start += share
    right.set_xlim(0, 1)
    right.set_xlabel("share of attention", color=MUTED)
    right.legend(ncols=3, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=MUTED, labelsize=8)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _shade(factor: int) -> tuple[float, float, float]:
    """Return a colour that pales with the factor."""
    depth = min(np.log2(factor) / np.log2(COARSEST), 1.0)
    dark, pale = np.array([0.20, 0.42, 0.36]), np.array([0.90, 0.94, 0.92])
    r, g, b = (1 - depth) * dark + depth * pale
    return float(r), float(g), float(b)
