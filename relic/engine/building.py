"""Make a scene from a seed: a house of two columns of rooms beside a court, doorways between them, furniture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from relic.engine.furniture import CENTRE, COURT, WALL, Piece, picture, wall_door
from relic.engine.materials import Material, Pattern, plain
from relic.engine.scenes import OUTDOORS, Opening, Point, Room, Scene, Solid, Thing, upright
from relic.ops.randomness import derive_seed

__all__ = ["make_scene"]

HALF: Final = 0.1  # m, half the thickness of a wall: each of two rooms has its own half
HEIGHT: Final = 3.1  # m, of the walls
FENCE: Final = 1.2  # m, round the court
DOOR: Final = (1.5, 2.25)  # m, width and height of a doorway
CEILING_OF_FLIGHT: Final = 2.8  # m: the camera stays below roofs and tree tops, also in the court
STRIPS: Final[tuple[tuple[Pattern, float], ...]] = (
    ("stripes", 1.6), ("panelled", HEIGHT), ("spots", 2.2), ("waves", 2.0), ("checks", 2.4), ("plain", 1.6),
    ("panelled", HEIGHT), ("plain", 1.6),
)  # fmt: skip
WALL_COLOURS: Final = ("blue", "green", "yellow", "pink", "teal", "orange", "purple", "red", "white", "beige")
THING_COLOURS: Final = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "black")
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


@dataclass
class Plan:
    """A room while it is being made: its outline (x0, z0, x1, z1) to the middle of its walls."""

    outline: tuple[float, float, float, float]
    court: bool
    openings: dict[str, list[Hole]] = field(default_factory=lambda: {side: [] for side in SIDES})

    @property
    def inside(self) -> tuple[float, float, float, float]:
        x0, z0, x1, z1 = self.outline
        return x0 + HALF, z0 + HALF, x1 - HALF, z1 - HALF


class Hole(NamedTuple):
    """A hole in a wall: from `start` to `stop` along it, from height `bottom` to `top`; `inner` leads to a room."""

    start: float
    stop: float
    bottom: float
    top: float
    inner: bool


SIDES: Final = ("back", "left", "front", "right")  # z0, x0, z1, x1: quarter turns of furniture along them


def make_scene(seed: int, index: int = 0) -> Scene:
    """Make scene number `index` of `seed`: the same on every machine."""
    rng = np.random.default_rng(derive_seed("scene", seed, index))
    plans = _outlines(rng)
    openings, trims = _doorways(plans, rng)
    for number, plan in enumerate(plans):
        openings += _windows(number, plan, plans, rng)
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


def _outlines(rng: np.random.Generator) -> list[Plan]:
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
        plans += [
            Plan((x, z0, x + width, z1), column == court_at) for z0, z1 in zip(cuts, cuts[1:], strict=False)
        ]
        x += width
    return plans


def _doorways(
    plans: Sequence[Plan], rng: np.random.Generator
) -> tuple[list[Opening], list[list[Thing]]]:
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


def _opening(rooms: tuple[int, int], hole: Hole, wall: float, upright_wall: bool) -> Opening:
    along, across = (hole.start, hole.stop), (wall - HALF, wall + HALF)
    (x0, x1), (z0, z1) = (across, along) if upright_wall else (along, across)
    return Opening(rooms, (x0, -hole.top, z0), (x1, -hole.bottom, z1))


def _shared(
    a: tuple[float, float, float, float], b: tuple[float, float, float, float], upright_wall: bool
) -> tuple[float, float, float] | None:
    """Return where outline a's right (or front) side meets b: (wall, start, stop), if a doorway fits there."""
    near, along = (0, 1) if upright_wall else (1, 0)
    if abs(a[near + 2] - b[near]) > 1e-6:
        return None
    start, stop = max(a[along], b[along]), min(a[along + 2], b[along + 2])
    return (a[near + 2], start, stop) if stop - start > DOOR[0] + 1.0 else None


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


def _windows(number: int, plan: Plan, plans: Sequence[Plan], rng: np.random.Generator) -> list[Opening]:
    """Cut a window into some outer walls of a room."""
    windows: list[Opening] = []
    for turn, side in enumerate(SIDES):
        if plan.court or plan.openings[side] or not _is_outer(plan, side, plans) or rng.random() > 0.45:
            continue
        start, stop = _run(plan, side)
        width = float(rng.uniform(1.2, 1.8))
        middle = float(rng.uniform(start + width / 2 + 0.5, stop - width / 2 - 0.5))
        hole = Hole(middle - width / 2, middle + width / 2, 0.95, 2.15, False)
        plan.openings[side].append(hole)
        wall = plan.outline[(1, 0, 3, 2)[turn]]
        windows.append(_opening((number, OUTDOORS), hole, wall, side in ("left", "right")))
    return windows


def _is_outer(plan: Plan, side: str, plans: Sequence[Plan]) -> bool:
    x0, z0, x1, z1 = plan.outline
    edge = {"back": (1, z0, min), "left": (0, x0, min), "front": (3, z1, max), "right": (2, x1, max)}[side]
    return edge[1] == edge[2](other.outline[edge[0]] for other in plans)


def _run(plan: Plan, side: str) -> tuple[float, float]:
    """Return from where to where the inside of a wall runs."""
    x0, z0, x1, z1 = plan.inside
    return (x0, x1) if side in ("back", "front") else (z0, z1)


def _furnish(
    plan: Plan, colour: str, floor: tuple[str, Material], trims: list[Thing], rng: np.random.Generator
) -> Room:
    x0, z0, x1, z1 = plan.inside
    height = CEILING_OF_FLIGHT if plan.court else float(rng.uniform(2.65, 2.95))
    if plan.court:
        floor = GROUNDS[int(rng.integers(len(GROUNDS)))]
    things = [*trims, *_place(plan, colour, rng)]
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


def _place(plan: Plan, walls: str, rng: np.random.Generator) -> list[Thing]:
    """Put furniture along the walls and in the middle, clear of doorways and of each other."""
    x0, z0, x1, z1 = plan.inside
    colours = [str(name) for name in rng.permutation([c for c in THING_COLOURS if c != walls])] * 3
    taken = [_clear_zone(plan, side, hole) for side in SIDES for hole in plan.openings[side] if hole.inner]
    pieces = list(rng.permutation(len(COURT if plan.court else WALL))) * 2
    things: list[Thing] = []
    for turn, side in enumerate(SIDES):
        start, stop = _run(plan, side)
        holes = [(hole.start - 0.3, hole.stop + 0.3) for hole in plan.openings[side]]
        cursor = start + 0.25
        while cursor < stop - 0.8:
            piece = (COURT if plan.court else WALL)[pieces[0]]
            middle = cursor + piece.width / 2
            blocked = [h for h in holes if h[0] < middle + piece.width / 2 and h[1] > middle - piece.width / 2]
            if middle + piece.width / 2 > stop - 0.1:
                break
            if blocked:
                cursor = blocked[0][1] + 0.05
                continue
            spot = _spot(plan, side, turn, middle)
            area = _footprint(spot, piece.width, piece.depth)
            if rng.random() < (0.55 if plan.court else 0.8) and not any(_overlap(area, t) for t in taken):
                pieces.pop(0)
                taken.append(area)
                things.append(piece.place(spot, colours.pop(), rng))
                if piece.low and not plan.court and rng.random() < 0.75:
                    things.append(_picture(spot, piece.width, colours.pop(), rng))
            elif not plan.court:
                things.append(
                    wall_door(spot, colours.pop())
                    if piece.width >= 1.4 and rng.random() < 0.5
                    else _picture(spot, piece.width, colours.pop(), rng)
                )
            cursor += piece.width + float(rng.uniform(0.3, 1.0)) + (0.8 if plan.court else 0.0)
            if len(pieces) < 2 or len(things) > 12:
                break
    return things + _middle(plan, taken, colours, rng)


def _picture(spot: tuple[float, float, int], width: float, frame: str, rng: np.random.Generator) -> Thing:
    return picture(spot, frame, width=min(1.3, max(0.7, width - 0.4)), seed=int(rng.integers(1 << 30)))


def _middle(plan: Plan, taken: list, colours: list[str], rng: np.random.Generator) -> list[Thing]:
    """Lay a rug and put something on it."""
    x0, z0, x1, z1 = plan.inside
    x = float((x0 + x1) / 2 + rng.uniform(-0.5, 0.5))
    z = float((z0 + z1) / 2 + rng.uniform(-0.5, 0.5))
    things = []
    if not plan.court:
        colour, half = colours.pop(), (float(rng.uniform(0.9, 1.3)), float(rng.uniform(0.9, 1.5)))
        rug = Material(colour, ("stripes", "spots", "bands", "checks")[int(rng.integers(4))], "beige", 1.2)
        flat = upright((x - half[0], x + half[0]), (0.0, 0.015), (z - half[1], z + half[1]), rug)
        things.append(Thing("rug", colour, (flat,), flat=True))
    choice: tuple[Piece, ...] = COURT if plan.court else CENTRE
    piece = choice[int(rng.integers(len(choice)))]
    spot = (x, z - piece.depth / 2, 0)
    area = _footprint(spot, piece.width, piece.depth)
    if rng.random() < 0.75 and not any(_overlap(area, t) for t in taken):
        things.append(piece.place(spot, colours.pop(), rng))
    return things


def _spot(plan: Plan, side: str, turn: int, middle: float) -> tuple[float, float, int]:
    x0, z0, x1, z1 = plan.inside
    return {"back": (middle, z0, turn), "left": (x0, middle, turn), "front": (middle, z1, turn),
            "right": (x1, middle, turn)}[side]  # fmt: skip


def _footprint(spot: tuple[float, float, int], width: float, depth: float) -> np.ndarray:
    """Return the (2, 2) low and high corner on the floor of a piece at a spot."""
    x, z, turn = spot
    across = np.array([(-width / 2, 0), (width / 2, depth)])
    turned = {0: across, 1: across[:, ::-1], 2: -across, 3: -across[:, ::-1]}[turn] + (x, z)
    return np.stack([turned.min(0), turned.max(0)])


def _clear_zone(plan: Plan, side: str, hole: Hole) -> np.ndarray:
    """Return the floor in front of a doorway that stays free."""
    spot = _spot(plan, side, SIDES.index(side), (hole.start + hole.stop) / 2)
    return _footprint(spot, hole.stop - hole.start + 0.5, 1.3)


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a[0] < b[1] + 0.1).all() and (b[0] < a[1] + 0.1).all())


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
