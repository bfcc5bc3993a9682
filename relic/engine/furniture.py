"""Furniture made of boxes, cylinders, cones and spheres; each maker takes a place and a colour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from relic.engine.materials import Material, plain
from relic.engine.scenes import Shape, Solid, Thing, upright

__all__ = ["CENTRE", "COURT", "WALL", "Piece", "picture", "wall_door"]

Extent = tuple[float, float]


class Spot(NamedTuple):
    """A place on the floor: the middle of a piece's back edge, and quarter turns (0: it faces +z)."""

    x: float
    z: float
    turn: int

    def solid(self, x: Extent, height: Extent, z: Extent, material: Material, shape: Shape = "box") -> Solid:
        """Make a solid given in the spot's frame: x along the back, z towards the front."""
        corners = np.array([(x[0], z[0]), (x[1], z[1])])
        c, s = [(1, 0), (0, 1), (-1, 0), (0, -1)][self.turn % 4]
        turned = np.stack([c * corners[:, 0] + s * corners[:, 1], -s * corners[:, 0] + c * corners[:, 1]], 1)
        (x0, z0), (x1, z1) = turned.min(0).tolist(), turned.max(0).tolist()
        along, across = (self.x + x0, self.x + x1), (self.z + z0, self.z + z1)
        return upright(along, height, across, material, shape=shape)


class Piece(NamedTuple):
    """A kind of furniture. `low` ones leave room for a picture above."""

    noun: str
    width: float
    depth: float
    low: bool
    make: Callable[[Spot, str, np.random.Generator], tuple[Solid, ...]]

    def place(self, spot: tuple[float, float, int], colour: str, rng: np.random.Generator) -> Thing:
        """Put one at a spot (x, z, quarter turns)."""
        return Thing(self.noun, colour, self.make(Spot(*spot), colour, rng))


WOOD: Final = Material("brown", "planks", "beige", 1.2)


def _sofa(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    body = plain(colour)
    return (
        spot.solid((-0.95, 0.95), (0, 0.42), (0.05, 0.85), body),
        spot.solid((-0.95, 0.95), (0.42, 0.85), (0.05, 0.28), body),
        spot.solid((-0.95, -0.75), (0.42, 0.62), (0.28, 0.85), body),
        spot.solid((0.75, 0.95), (0.42, 0.62), (0.28, 0.85), body),
        spot.solid((-0.6, -0.1), (0.42, 0.72), (0.28, 0.42), plain("white")),
    )


def _bed(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    return (
        spot.solid((-0.8, 0.8), (0, 1.0), (0.03, 0.13), WOOD),
        spot.solid((-0.8, 0.8), (0, 0.3), (0.13, 2.0), plain("white")),
        spot.solid((-0.8, 0.8), (0.3, 0.5), (0.65, 2.0), Material(colour, "stripes", "white", 0.8)),
        spot.solid((-0.8, 0.8), (0.3, 0.46), (0.13, 0.65), plain("white")),
    )


def _table(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    legs = [
        spot.solid((x - 0.05, x + 0.05), (0, 0.7), (z - 0.05, z + 0.05), plain(colour))
        for x in (-0.6, 0.6)
        for z in (0.1, 0.9)
    ]
    vase = spot.solid((-0.12, 0.12), (0.78, 1.1), (0.38, 0.62), plain("teal"), "cylinder")
    return (*legs, spot.solid((-0.7, 0.7), (0.7, 0.78), (0.0, 1.0), plain(colour)), vase)


def _desk(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    return (
        spot.solid((-0.7, -0.6), (0, 0.72), (0.05, 0.6), plain(colour)),
        spot.solid((0.25, 0.7), (0, 0.72), (0.05, 0.6), plain(colour)),
        spot.solid((-0.75, 0.75), (0.72, 0.78), (0.03, 0.65), WOOD),
        spot.solid((-0.3, 0.3), (0.85, 1.25), (0.2, 0.25), plain("black")),
        spot.solid((-0.05, 0.05), (0.78, 0.9), (0.2, 0.25), plain("black")),
    )


def _chair(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    return (
        spot.solid((-0.32, 0.32), (0, 0.45), (0.1, 0.7), plain(colour)),
        spot.solid((-0.32, 0.32), (0.45, 1.0), (0.1, 0.22), plain(colour)),
    )


def _bookshelf(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    frame, books = plain(colour), rng.permutation(["red", "yellow", "blue", "green", "white", "purple"])
    solids = [spot.solid((-0.7, 0.7), (0, 2.1), (0.02, 0.12), frame)]
    solids += [spot.solid((x - 0.04, x + 0.04), (0, 2.1), (0.12, 0.42), frame) for x in (-0.66, 0.66)]
    solids += [
        spot.solid((-0.62, 0.62), (h, h + 0.06), (0.12, 0.42), frame) for h in (0.06, 0.72, 1.38, 2.04)
    ]
    for row, h in enumerate((0.12, 0.78, 1.44)):
        split = float(rng.uniform(-0.3, 0.3))
        first, second = plain(str(books[2 * row])), plain(str(books[2 * row + 1]))
        solids.append(spot.solid((-0.6, split), (h, h + float(rng.uniform(0.3, 0.5))), (0.12, 0.36), first))
        solids.append(
            spot.solid((split + 0.04, 0.5), (h, h + float(rng.uniform(0.3, 0.5))), (0.12, 0.36), second)
        )
    return tuple(solids)


def _cabinet(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    front = plain("beige" if colour != "beige" else "brown")
    doors = [spot.solid((x - 0.3, x + 0.3), (0.12, 0.78), (0.5, 0.53), front) for x in (-0.35, 0.35)]
    return (spot.solid((-0.75, 0.75), (0, 0.9), (0.03, 0.5), plain(colour)), *doors)


def _lamp(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    return (
        spot.solid((-0.2, 0.2), (0, 0.06), (0.15, 0.55), plain("black"), "cylinder"),
        spot.solid((-0.03, 0.03), (0.06, 1.5), (0.32, 0.38), plain("black")),
        spot.solid((-0.27, 0.27), (1.35, 1.8), (0.08, 0.62), plain(colour, glow=True), "cone"),
    )


def _plant(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    leaves = Material("green", "leaves", "yellow", 0.8, seed=int(rng.integers(8)))
    return (
        spot.solid((-0.22, 0.22), (0, 0.4), (0.1, 0.54), plain(colour), "cylinder"),
        spot.solid((-0.4, 0.4), (0.4, 1.4), (-0.08, 0.72), leaves, "sphere"),
    )


def _column(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    shaft = Material(colour, "bands", "white", 0.9)
    return (
        spot.solid((-0.35, 0.35), (0, 0.25), (0, 0.7), plain(colour)),
        spot.solid((-0.26, 0.26), (0.25, 2.35), (0.09, 0.61), shaft, "cylinder"),
        spot.solid((-0.35, 0.35), (2.35, 2.6), (0, 0.7), plain(colour)),
    )


def _statue(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    shapes: tuple[Shape, ...] = ("sphere", "cone", "box")
    top = shapes[int(rng.integers(3))]
    return (
        spot.solid((-0.4, 0.4), (0, 0.7), (0.1, 0.9), plain("grey")),
        spot.solid((-0.34, 0.34), (0.7, 1.55), (0.16, 0.84), plain(colour), top),
    )


def _crates(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    second = plain("orange" if colour != "orange" else "blue")
    return (
        spot.solid((-0.7, 0.05), (0, 0.7), (0.1, 0.85), Material(colour, "checks", "white", 0.7)),
        spot.solid((0.1, 0.7), (0, 0.6), (0.2, 0.8), second),
        spot.solid((-0.5, 0.2), (0.7, 1.3), (0.15, 0.75), plain(colour)),
    )


def _tree(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    leaves = Material(colour, "leaves", "green" if colour != "green" else "yellow", 1.6, int(rng.integers(8)))
    shape: Shape = "sphere" if rng.random() < 0.6 else "cone"
    return (
        spot.solid((-0.16, 0.16), (0, 1.7), (0.7, 1.02), plain("brown"), "cylinder"),
        spot.solid((-0.85, 0.85), (1.3, 3.4), (0.0, 1.7), leaves, shape),
    )


def _bench(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    return (
        spot.solid((-0.8, 0.8), (0.38, 0.48), (0.2, 0.65), plain(colour)),
        spot.solid((-0.8, 0.8), (0.6, 0.95), (0.15, 0.22), plain(colour)),
        spot.solid((-0.7, -0.58), (0, 0.6), (0.18, 0.6), plain("black")),
        spot.solid((0.58, 0.7), (0, 0.6), (0.18, 0.6), plain("black")),
    )


def _fountain(spot: Spot, colour: str, rng: np.random.Generator) -> tuple[Solid, ...]:
    return (
        spot.solid((-1.0, 1.0), (0, 0.45), (0.0, 2.0), plain("grey"), "cylinder"),
        spot.solid((-0.85, 0.85), (0.45, 0.47), (0.15, 1.85), plain("blue"), "cylinder"),
        spot.solid((-0.18, 0.18), (0.45, 1.3), (0.82, 1.18), plain("white"), "cylinder"),
        spot.solid((-0.4, 0.4), (1.3, 1.9), (0.6, 1.4), plain(colour), "sphere"),
    )


WALL: Final = (
    Piece("sofa", 2.0, 0.9, True, _sofa),
    Piece("bed", 1.7, 2.05, True, _bed),
    Piece("desk", 1.6, 0.7, True, _desk),
    Piece("cabinet", 1.6, 0.55, True, _cabinet),
    Piece("bookshelf", 1.5, 0.45, False, _bookshelf),
    Piece("lamp", 0.7, 0.7, False, _lamp),
    Piece("plant", 0.9, 0.75, False, _plant),
    Piece("chair", 0.8, 0.75, True, _chair),
)
CENTRE: Final = (
    Piece("table", 1.5, 1.0, True, _table),
    Piece("column", 0.7, 0.7, False, _column),
    Piece("statue", 0.8, 1.0, False, _statue),
    Piece("crates", 1.5, 0.9, False, _crates),
)
COURT: Final = (
    Piece("tree", 1.7, 1.7, False, _tree),
    Piece("bench", 1.7, 0.7, True, _bench),
    Piece("fountain", 2.0, 2.0, False, _fountain),
    Piece("statue", 0.8, 1.0, False, _statue),
    Piece("crates", 1.5, 0.9, False, _crates),
)


def picture(spot: tuple[float, float, int], frame: str, *, width: float, seed: int) -> Thing:
    """Hang an abstract picture at eye height on the wall behind a spot."""
    place, half, high = Spot(*spot), width / 2, 0.75 * width
    rim = place.solid((-half - 0.07, half + 0.07), (1.18, 1.32 + high), (0.0, 0.03), plain(frame))
    art = Material(frame, "painting", period=None, seed=seed)
    return Thing("picture", frame, (rim, place.solid((-half, half), (1.25, 1.25 + high), (0.03, 0.05), art)))


def wall_door(spot: tuple[float, float, int], colour: str) -> Thing:
    """Set a closed door into the wall behind a spot."""
    place = Spot(*spot)
    frame = plain("white" if colour != "white" else "brown")
    return Thing(
        "door",
        colour,
        (
            place.solid((-0.6, 0.6), (0, 2.2), (0.0, 0.03), frame),
            place.solid((-0.5, 0.5), (0, 2.1), (0.03, 0.06), plain(colour)),
            place.solid((0.3, 0.4), (0.95, 1.05), (0.06, 0.12), plain("yellow")),
        ),
    )
