"""One sentence for every five seconds: which place it is, what is in view; never how the camera moves."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

from relic.engine.scenes import Room, Scene
from relic.ops.camera import invert_rigid, project

__all__ = ["SEGMENT_S", "describe"]

SEGMENT_S: Final = 5.0
LOOKS_A_SECOND: Final = 2
MOST_THINGS: Final = 3
FAR_M: Final = 9.0


def describe(scene: Scene, c2w: Tensor, *, fps: float, intrinsics_px: Tensor) -> tuple[str, ...]:
    """Caption each segment of a path (f, 4, 4), the last perhaps a short one.

    intrinsics_px: (4,) `fx fy cx cy` of the camera. Things in other rooms are left out.
    """
    length = round(SEGMENT_S * fps)
    stride = max(1, round(fps / LOOKS_A_SECOND))
    return tuple(
        _caption(scene, c2w[start : start + length : stride], intrinsics_px)
        for start in range(0, len(c2w), length)
    )


def _caption(scene: Scene, looks: Tensor, intrinsics_px: Tensor) -> str:
    room = _room(scene, looks[:, :3, 3].numpy())
    if not room.things:
        return _sentence(room, [])
    centres = torch.from_numpy(np.stack([thing.centre for thing in room.things]))
    pixels, depth = project(centres, invert_rigid(looks), intrinsics_px=intrinsics_px)
    _, _, cx, cy = intrinsics_px.tolist()
    inside = ((pixels >= -0.5) & (pixels <= torch.tensor([2 * cx + 0.5, 2 * cy + 0.5]))).all(-1)
    weight = torch.where(inside & (depth > 0.2) & (depth < FAR_M), 1 / depth.clamp(min=1.0), 0.0).sum(0)
    seen: dict[str, float] = {}
    for thing, share in zip(room.things, weight.tolist(), strict=True):
        if share > 0:
            name = f"{_article(thing.colour)} {thing.colour} {thing.noun}"
            seen[name] = seen.get(name, 0.0) + share
    names = [name for name, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:MOST_THINGS]]
    return _sentence(room, names)


def _sentence(room: Room, names: list[str]) -> str:
    place = f"a court with {room.floor}" if room.kind == "court" else f"a room with {_floor(room.floor)}"
    *others, last = [f"{room.walls} walls", *names]
    return f"{', '.join([place, *others])} and {last}"


def _floor(floor: str) -> str:
    return f"a {floor}" if floor.endswith("carpet") else f"a {floor} floor"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _room(scene: Scene, points: np.ndarray) -> Room:
    """Return the room in which most of the points (n, 3) are."""
    shares = [room.holds(points).sum() for room in scene.rooms]
    if max(shares) > 0:
        return scene.rooms[int(np.argmax(shares))]
    point = points.mean(0)  # in the middle of a doorway all the time
    return min(scene.rooms, key=lambda room: math.dist(point, np.add(room.low, room.high) / 2))
