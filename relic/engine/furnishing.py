"""Where things go in a room: furniture along the walls, pictures on them, something in the middle."""

from __future__ import annotations

import numpy as np

from relic.engine.furniture import CENTRE, COURT, WALL, Piece, picture, wall_door
from relic.engine.layout import SIDES, THING_COLOURS, Hole, Plan
from relic.engine.materials import Material
from relic.engine.scenes import Thing, upright

__all__ = ["place_things"]


def place_things(plan: Plan, walls: str, rng: np.random.Generator) -> list[Thing]:
    """Put furniture along the walls and in the middle, clear of doorways and of each other."""
    colours = [str(name) for name in rng.permutation([c for c in THING_COLOURS if c != walls])] * 3
    taken = [_clear_zone(plan, side, hole) for side in SIDES for hole in plan.openings[side] if hole.inner]
    pieces = list(rng.permutation(len(COURT if plan.court else WALL))) * 2
    things: list[Thing] = []
    for turn, side in enumerate(SIDES):
        start, stop = plan.run(side)
        holes = [(hole.start - 0.3, hole.stop + 0.3) for hole in plan.openings[side]]
        cursor = start + 0.25
        while cursor < stop - 0.8:
            piece = (COURT if plan.court else WALL)[pieces[0]]
            middle = cursor + piece.width / 2
            blocked = [
                h for h in holes if h[0] < middle + piece.width / 2 and h[1] > middle - piece.width / 2
            ]
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
