"""The plan of a house: two columns of rooms beside a court, with doorways and windows in their walls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from relic.engine.materials import plain
from relic.engine.scenes import OUTDOORS, Opening, Thing, upright

__all__ = ["HALF", "SIDES", "THING_COLOURS", "Hole", "Plan", "cut_doorways", "cut_windows", "draw_outlines"]

HALF: Final = 0.1  # m, half the thickness of a wall: each of two rooms has its own half
DOOR: Final = (1.5, 2.25)  # m, width and height of a doorway
SIDES: Final = ("back", "left", "front", "right")  # z0, x0, z1, x1: quarter turns of furniture along them
THING_COLOURS: Final = (
    "red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "black",
)  # fmt: skip


class Hole(NamedTuple):
    """A hole in a wall, `start` to `stop` along it, height `bottom` to `top`; `inner` leads to a room."""

    start: float
    stop: float
    bottom: float
    top: float
    inner: bool


@dataclass
class Plan:
    """A room while it is being made: its outline (x0, z0, x1, z1) to the middle of its walls."""

    outline: tuple[float, float, float, float]
    court: bool
    openings: dict[str, list[Hole]] = field(default_factory=lambda: {side: [] for side in SIDES})

    @property
    def inside(self) -> tuple[float, float, float, float]:
        """The outline of the free floor."""
        x0, z0, x1, z1 = self.outline
        return x0 + HALF, z0 + HALF, x1 - HALF, z1 - HALF

    def run(self, side: str) -> tuple[float, float]:
        """Return from where to where the inside of a wall runs."""
        x0, z0, x1, z1 = self.inside
        return (x0, x1) if side in ("back", "front") else (z0, z1)


def draw_outlines(rng: np.random.Generator) -> list[Plan]:
    """Divide the ground into two columns of one or two rooms and a court on the left or on the right."""
    widths = [float(rng.uniform(4.6, 6.4)) for _ in range(2)]
    court_at = int(rng.integers(2)) * 2
    widths.insert(court_at, float(rng.uniform(7.0, 9.0)))
    depth = float(rng.uniform(9.0, 11.0))
    plans, x = [], 0.0
    for column, width in enumerate(widths):
        cuts = [0.0, depth]
        if column != court_at and rng.random() < 0.8:
            cuts.insert(1, float(depth * rng.uniform(0.42, 0.58)))
        plans += [Plan((x, z0, x + width, z1), column == court_at) for z0, z1 in pairwise(cuts)]
        x += width
    return plans


def cut_doorways(plans: Sequence[Plan], rng: np.random.Generator) -> tuple[list[Opening], list[list[Thing]]]:
    """Open ways between neighbours so that every room is reached, and most walls that can have one do."""
    neighbours = []
    for a in range(len(plans)):
        for b in range(a + 1, len(plans)):
            for upright_wall in (True, False):
                shared = _shared(plans[a].outline, plans[b].outline, upright_wall)
                if shared is not None:
                    neighbours.append((a, b, upright_wall, shared))
    colours = [str(name) for name in rng.permutation(THING_COLOURS)]
    reached = list(range(len(plans)))
    doorways: list[Opening] = []
    trims: list[list[Thing]] = [[] for _ in plans]
    for k in rng.permutation(len(neighbours)):
        a, b, upright_wall, (wall, start, stop) = neighbours[k]
        if reached[a] == reached[b] and rng.random() > 0.75:
            continue
        reached = [reached[a] if group == reached[b] else group for group in reached]
        width, height = DOOR
        middle = float(rng.uniform(start + width / 2 + 0.4, stop - width / 2 - 0.4))
        hole = Hole(middle - width / 2, middle + width / 2, 0.0, height, inner=True)
        plans[a].openings["right" if upright_wall else "front"].append(hole)
        plans[b].openings["left" if upright_wall else "back"].append(hole)
        doorways.append(_opening((int(a), int(b)), hole, wall, upright_wall))
        trims[a].append(_trim(hole, wall, upright_wall, colours[len(doorways) % len(colours)]))
    return doorways, trims


def cut_windows(number: int, plan: Plan, plans: Sequence[Plan], rng: np.random.Generator) -> list[Opening]:
    """Cut a window into some outer walls of a room."""
    windows: list[Opening] = []
    for turn, side in enumerate(SIDES):
        if plan.court or plan.openings[side] or not _is_outer(plan, side, plans) or rng.random() > 0.45:
            continue
        start, stop = plan.run(side)
        width = float(rng.uniform(1.2, 1.8))
        middle = float(rng.uniform(start + width / 2 + 0.5, stop - width / 2 - 0.5))
        hole = Hole(middle - width / 2, middle + width / 2, 0.95, 2.15, False)
        plan.openings[side].append(hole)
        wall = plan.outline[(1, 0, 3, 2)[turn]]
        windows.append(_opening((number, OUTDOORS), hole, wall, side in ("left", "right")))
    return windows


def _shared(
    a: tuple[float, float, float, float], b: tuple[float, float, float, float], upright_wall: bool
) -> tuple[float, float, float] | None:
    """Return where a's right (or front) side meets b, (wall, start, stop), if a doorway fits there."""
    near, along = (0, 1) if upright_wall else (1, 0)
    if abs(a[near + 2] - b[near]) > 1e-6:
        return None
    start, stop = max(a[along], b[along]), min(a[along + 2], b[along + 2])
    return (a[near + 2], start, stop) if stop - start > DOOR[0] + 1.0 else None


def _opening(rooms: tuple[int, int], hole: Hole, wall: float, upright_wall: bool) -> Opening:
    along, across = (hole.start, hole.stop), (wall - HALF, wall + HALF)
    (x0, x1), (z0, z1) = (across, along) if upright_wall else (along, across)
    return Opening(rooms, (x0, -hole.top, z0), (x1, -hole.bottom, z1))


def _trim(hole: Hole, wall: float, upright_wall: bool, colour: str) -> Thing:
    """Frame a doorway in its own colour, standing out of the wall on both sides."""
    material, deep = plain(colour), (wall - HALF - 0.05, wall + HALF + 0.05)
    parts = [
        ((hole.start - 0.14, hole.start + 0.02), (0.0, hole.top)),
        ((hole.stop - 0.02, hole.stop + 0.14), (0.0, hole.top)),
        ((hole.start - 0.14, hole.stop + 0.14), (hole.top - 0.02, hole.top + 0.16)),
    ]
    solids = (
        upright(deep, height, along, material) if upright_wall else upright(along, height, deep, material)
        for along, height in parts
    )
    return Thing("doorway", colour, tuple(solids))


def _is_outer(plan: Plan, side: str, plans: Sequence[Plan]) -> bool:
    x0, z0, x1, z1 = plan.outline
    edge = {"back": (1, z0, min), "left": (0, x0, min), "front": (3, z1, max), "right": (2, x1, max)}[side]
    return edge[1] == edge[2](other.outline[edge[0]] for other in plans)
