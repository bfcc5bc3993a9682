"""What a scene is: rooms, what is in them and the openings between them, as plain values, no renderer.

The world has the camera's sense of axes, in metres: x right, y down, z forward. The floor is
y = 0 and a height is −y.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np

from relic.engine.materials import Material

__all__ = ["OUTDOORS", "Opening", "Room", "Scene", "Solid", "Thing", "upright"]

Shape = Literal["box", "cylinder", "cone", "sphere"]
Point = tuple[float, float, float]
OUTDOORS: Final = -1  # the number of what is not a room


@dataclass(frozen=True)
class Solid:
    """A body that fills the axis-aligned box from `low` to `high` (x, y, z metres); round ones touch it."""

    low: Point
    high: Point
    material: Material
    shape: Shape = "box"


@dataclass(frozen=True)
class Thing:
    """Something a caption can name: "a {colour} {noun}". It blocks the way unless it lies flat."""

    noun: str
    colour: str
    solids: tuple[Solid, ...]
    flat: bool = False

    @property
    def centre(self) -> np.ndarray:
        """The middle of its bounding box, (3,)."""
        low = np.min([solid.low for solid in self.solids], axis=0)
        high = np.max([solid.high for solid in self.solids], axis=0)
        return (low + high) / 2


@dataclass(frozen=True)
class Room:
    """A room or a court: the free box from `low` to `high`, its shell and what is in it.

    Args:
        kind: "room" or "court" (no ceiling, lit by the sun).
        low: Corner of the free space (x, top, z).
        high: Corner of the free space (x, floor = 0, z).
        walls: Colour of the walls.
        floor: Colour and material name of the floor, e.g. "brown wooden".
        lamp: Where its light hangs.
        tint: Colour of its light, RGB near 1.
        shell: Walls, floor and ceiling.
        things: Furniture, pictures, doors.
    """

    kind: Literal["room", "court"]
    low: Point
    high: Point
    walls: str
    floor: str
    lamp: Point
    tint: Point
    shell: tuple[Solid, ...]
    things: tuple[Thing, ...]

    def holds(self, points: np.ndarray) -> np.ndarray:
        """Return which points (n, 3) stand on its floor plan, (n,) bool."""
        x, z = points[:, 0], points[:, 2]
        return (self.low[0] <= x) & (x <= self.high[0]) & (self.low[2] <= z) & (z <= self.high[2])


@dataclass(frozen=True)
class Opening:
    """A hole in a wall, the box from `low` to `high`: a doorway between two rooms, or a window `OUTDOORS`."""

    rooms: tuple[int, int]
    low: Point
    high: Point


@dataclass(frozen=True)
class Scene:
    """A place: a pure function of seed and index (see `relic.engine.building.make_scene`).

    Args:
        seed: What it was made from, with `index`.
        index: Number of the scene among those of one seed.
        rooms: Rooms and the court.
        openings: Doorways and windows; every room can be reached.
        surroundings: What is seen over the fence and through windows.
        sky: RGB at the horizon and overhead.
        low: Corner of the space in which a camera may be.
        high: The opposite corner.
    """

    seed: int
    index: int
    rooms: tuple[Room, ...]
    openings: tuple[Opening, ...]
    surroundings: tuple[Solid, ...]
    sky: tuple[Point, Point]
    low: Point
    high: Point

    @property
    def name(self) -> str:
        """The unit of holding out, e.g. "seed0-scene-00003"."""
        return f"seed{self.seed}-scene-{self.index:05d}"

    @cached_property
    def obstacles(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounding boxes of everything a camera must keep clear of: lows (n, 3) and highs (n, 3), metres."""
        solids = [solid for room in self.rooms for solid in room.shell]
        solids += [s for room in self.rooms for thing in room.things if not thing.flat for s in thing.solids]
        return np.array([s.low for s in solids]), np.array([s.high for s in solids])


def upright(
    x: tuple[float, float],
    height: tuple[float, float],
    z: tuple[float, float],
    material: Material,
    *,
    shape: Shape = "box",
) -> Solid:
    """Make a solid from its extents, height measured upwards from the floor."""
    return Solid((x[0], -height[1], z[0]), (x[1], -height[0], z[1]), material, shape)
