"""A plain room with glowing markers at known places, for tests that measure pixels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from relic.engine.materials import COLOURS, plain
from relic.engine.scenes import Opening, Room, Scene, Solid, Thing, upright

Point = tuple[float, float, float]
ORIGIN = torch.eye(4, dtype=torch.float64)
ORIGIN[:3, 3] = torch.tensor([0.0, -1.5, 0.0])  # level at eye height, looking to +z


def marker(colour: str, centre: Point, *, radius: float = 0.12) -> Thing:
    """A glowing ball."""
    low, high = (tuple(c + sign * radius for c in centre) for sign in (-1, 1))
    return Thing("lamp", colour, (Solid(low, high, plain(colour, glow=True), "sphere"),))


def studio(markers: Mapping[str, Point]) -> Scene:
    """A white room of 16 x 3 x 16 m round the origin, with a ball of each colour at a place."""
    half = 8.0
    far = ((-half, half), (half, half + 0.1), (-half - 0.1, -half))
    floor = upright(far[0], (-0.1, 0.0), far[0], plain("white"))
    ceiling = upright(far[0], (3.0, 3.1), far[0], plain("white"))
    walls = [upright(x, (0.0, 3.0), z, plain("white")) for x, z in
             ((far[0], far[1]), (far[0], far[2]), (far[1], far[0]), (far[2], far[0]))]  # fmt: skip
    room = Room(
        kind="room", low=(-half, -3.0, -half), high=(half, 0.0, half), walls="white", floor="white wooden",
        lamp=(0.0, -2.7, 0.0), tint=(1.0, 1.0, 1.0), shell=(floor, ceiling, *walls),
        things=tuple(marker(colour, centre) for colour, centre in markers.items()),
    )  # fmt: skip
    window = Opening((0, -1), (-half, -2.0, -half - 0.1), (-half + 1, -1.0, -half))
    sky = ((200.0, 222.0, 240.0), (74.0, 130.0, 214.0))
    return Scene(0, 0, (room,), (window,), (floor,), sky, room.low, room.high)


def find(picture: np.ndarray, colour: str) -> tuple[float, float] | None:
    """Return the centroid (x, y) in pixels of what has a marker's colour, None if nothing has."""
    off = np.abs(picture.astype(int) - np.array(COLOURS[colour])).max(-1)
    rows, columns = np.nonzero(off < 12)
    return (float(columns.mean()), float(rows.mean())) if len(rows) else None


def centres(markers: Mapping[str, Point]) -> Tensor:
    return torch.tensor(list(markers.values()), dtype=torch.float64)
