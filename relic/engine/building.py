"""Make a scene from a seed: plan a house beside a court, build its walls, furnish it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from relic.engine.furnishing import place_things
from relic.engine.layout import (
    HALF,
    SIDES,
    THING_COLOURS,
    Hole,
    Plan,
    cut_doorways,
    cut_windows,
    draw_outlines,
)
from relic.engine.materials import Material, Pattern, plain
from relic.engine.scenes import Point, Room, Scene, Solid, Thing, upright
from relic.ops.randomness import derive_seed

__all__ = ["make_scene"]

HEIGHT: Final = 3.1  # m, of the walls
FENCE: Final = 1.2  # m, round the court
CEILING_OF_FLIGHT: Final = 2.8  # m: the camera stays below roofs and tree tops, also in the court
STRIPS: Final[tuple[tuple[Pattern, float], ...]] = (
    ("stripes", 1.6), ("panelled", HEIGHT), ("spots", 2.2), ("waves", 2.0), ("checks", 2.4), ("plain", 1.6),
    ("panelled", HEIGHT), ("plain", 1.6),
)  # fmt: skip
WALL_COLOURS: Final[tuple[str, ...]] = (
    "blue",
    "green",
    "yellow",
    "pink",
    "teal",
    "orange",
    "purple",
    "red",
    "white",
    "beige",
)
FLOORS: Final[tuple[tuple[str, Material], ...]] = (
    ("brown wooden", Material("brown", "planks", "orange", 2.0)),
    ("grey tiled", Material("grey", "checks", "white", 1.6)),
    ("beige wooden", Material("beige", "planks", "brown", 2.4)),
    ("red tiled", Material("red", "checks", "beige", 2.0)),
    ("blue carpet", Material("blue", "leaves", "purple", 2.5)),
    ("green carpet", Material("green", "spots", "beige", 2.4)),
)
GROUNDS: Final[tuple[tuple[str, Material], ...]] = (
    ("green grass", Material("green", "leaves", "yellow", 4.0)),
    ("beige stone", Material("beige", "checks", "grey", 3.0)),
    ("grey stone", Material("grey", "waves", "white", 3.0)),
)
SKIES: Final[tuple[tuple[Point, Point], ...]] = (
    ((200, 222, 240), (74, 130, 214)), ((250, 206, 150), (98, 120, 188)),
    ((226, 232, 236), (150, 176, 204)), ((240, 180, 190), (92, 84, 160)),
)  # fmt: skip


def make_scene(seed: int, index: int = 0) -> Scene:
    """Make scene number `index` of `seed`: the same on every machine."""
    rng = np.random.default_rng(derive_seed("scene", seed, index))
    plans = draw_outlines(rng)
    openings, trims = cut_doorways(plans, rng)
    for number, plan in enumerate(plans):
        openings += cut_windows(number, plan, plans, rng)
    walls = [str(name) for name in rng.permutation(WALL_COLOURS)]
    floors = rng.permutation(len(FLOORS))
    rooms = tuple(
        _furnish(plan, walls[i], FLOORS[floors[i % len(FLOORS)]], trims[i], rng)
        for i, plan in enumerate(plans)
    )
    corners = np.array([plan.inside for plan in plans])
    (x0, z0), (x1, z1) = corners[:, :2].min(0), corners[:, 2:].max(0)
    return Scene(
        seed=seed,
        index=index,
        rooms=rooms,
        openings=tuple(openings),
        surroundings=_surroundings((float(x0 + x1) / 2, float(z0 + z1) / 2), rng),
        sky=SKIES[int(rng.integers(len(SKIES)))],
        low=(float(x0), -CEILING_OF_FLIGHT, float(z0)),
        high=(float(x1), 0.0, float(z1)),
    )


def _furnish(
    plan: Plan, colour: str, floor: tuple[str, Material], trims: list[Thing], rng: np.random.Generator
) -> Room:
    x0, z0, x1, z1 = plan.inside
    height = CEILING_OF_FLIGHT if plan.court else float(rng.uniform(2.65, 2.95))
    if plan.court:
        floor = GROUNDS[int(rng.integers(len(GROUNDS)))]
    things = [*trims, *place_things(plan, colour, rng)]
    warmth = float(rng.uniform(-0.07, 0.07))
    return Room(
        kind="court" if plan.court else "room",
        low=(x0, -height, z0),
        high=(x1, 0.0, z1),
        walls=colour,
        floor=floor[0],
        lamp=(x0 + (x1 - x0) * float(rng.uniform(0.35, 0.65)), -height + 0.3, (z0 + z1) / 2),
        tint=(1.0 + warmth, 1.0, 1.0 - warmth),
        shell=_shell(plan, colour, floor[1], height, rng),
        things=tuple(things),
    )


def _shell(
    plan: Plan, colour: str, floor: Material, height: float, rng: np.random.Generator
) -> tuple[Solid, ...]:
    """Build floor, ceiling and the room's half of its walls; one wall differs from the others."""
    x0, z0, x1, z1 = plan.outline
    pattern, period = STRIPS[int(rng.integers(len(STRIPS)))]
    second = "white" if colour not in ("white", "beige") else "grey"
    wall = Material(colour, pattern, second, period)
    accent = Material(second if rng.random() < 0.5 else colour, "plain" if pattern != "plain" else "panelled",
                      colour, HEIGHT)  # fmt: skip
    accent_side = SIDES[int(rng.integers(4))]
    solids = [upright((x0, x1), (-0.1, 0.0), (z0, z1), floor)]
    if not plan.court:
        solids.append(upright((x0, x1), (height, HEIGHT + 0.1), (z0, z1), plain("white")))
    edges = {
        "back": (z0, z0 + HALF),
        "left": (x0, x0 + HALF),
        "front": (z1 - HALF, z1),
        "right": (x1 - HALF, x1),
    }
    for side in SIDES:
        along = (x0, x1) if side in ("back", "front") else (z0, z1)
        inner = any(hole.inner for hole in plan.openings[side])
        top = HEIGHT if inner or not plan.court else FENCE
        material = accent if side == accent_side else wall
        for start, stop, bottom, upper in _pieces(along, plan.openings[side], top):
            across = edges[side]
            solids.append(
                upright((start, stop), (bottom, upper), across, material)
                if side in ("back", "front")
                else upright(across, (bottom, upper), (start, stop), material)
            )
    return tuple(solids)


def _pieces(
    along: tuple[float, float], holes: Sequence[Hole], top: float
) -> list[tuple[float, float, float, float]]:
    """Cut holes out of a wall -> rectangles (start, stop, bottom, top)."""
    pieces, cursor = [], along[0]
    for hole in sorted(holes):
        pieces.append((cursor, hole.start, 0.0, top))
        if hole.bottom > 0:
            pieces.append((hole.start, hole.stop, 0.0, hole.bottom))
        if hole.top < top:
            pieces.append((hole.start, hole.stop, hole.top, top))
        cursor = hole.stop
    return [*pieces, (cursor, along[1], 0.0, top)]


def _surroundings(centre: tuple[float, float], rng: np.random.Generator) -> tuple[Solid, ...]:
    """Lay ground around the house and put towers, hills and trees in the distance."""
    solids = [
        upright((centre[0] - 90, centre[0] + 90), (-0.3, -0.15), (centre[1] - 90, centre[1] + 90),
                Material("green", "leaves", "beige", 12.0))
    ]  # fmt: skip
    for angle in np.linspace(0, 2 * np.pi, 14, endpoint=False) + rng.uniform(0, 0.3, 14):
        far, size = float(rng.uniform(18, 55)), float(rng.uniform(2.5, 6))
        x, z = centre[0] + far * float(np.cos(angle)), centre[1] + far * float(np.sin(angle))
        colour = str(rng.choice(THING_COLOURS))
        side, ends = (x - size / 2, x + size / 2), (z - size / 2, z + size / 2)
        kind = rng.random()
        if kind < 0.5:
            facade = Material(colour, "bands" if kind < 0.25 else "checks", "white", size)
            solids.append(upright(side, (-0.2, float(rng.uniform(6, 16))), ends, facade))
        elif kind < 0.75:
            crown = Material("green", "leaves", colour, 4.0)
            solids.append(upright(side, (0.5, 1.5 * size), ends, crown, shape="sphere"))
        else:
            wide = 2.5 * size
            solids.append(upright((x - wide, x + wide), (-0.2, size), (z - wide, z + wide),
                                  Material("green", "leaves", "brown", 8.0), shape="cone"))  # fmt: skip
    return tuple(solids)
