"""Which rooms a camera can see: through doorways, and through the doorways seen through them."""

from __future__ import annotations

from itertools import product
from typing import Final

import numpy as np

from relic.engine.scenes import OUTDOORS, Scene

__all__ = ["Visibility"]

MARGIN: Final = 0.25  # m round an opening: its frame stands out of the wall
NEAR: Final = 0.05  # m

Window = tuple[float, float, float, float]  # left, top, right, bottom in units of depth


class Visibility:
    """Finds what can be seen in a scene. It may name a room that is hidden, never miss one that shows.

    Args:
        scene: Rooms and openings.
        reach: Half the width and half the height of the picture, in focal lengths.
    """

    def __init__(self, scene: Scene, *, reach: tuple[float, float]) -> None:
        self.scene = scene
        self._reach = reach
        boxes = [(np.array(o.low) - MARGIN, np.array(o.high) + MARGIN) for o in scene.openings]
        self._lows = np.array([low for low, _ in boxes])
        self._highs = np.array([high for _, high in boxes])
        picks = np.array(list(product((0, 1), repeat=3)), dtype=bool)
        self._corners = np.where(picks[None], self._highs[:, None], self._lows[:, None])
        self._ways: list[list[tuple[int, int]]] = [[] for _ in scene.rooms]
        for number, opening in enumerate(scene.openings):
            a, b = opening.rooms
            self._ways[a].append((number, b))
            if b != OUTDOORS:
                self._ways[b].append((number, a))

    def __call__(self, c2w: np.ndarray) -> list[int]:
        """Return the rooms seen from a pose (4, 4), nearest first; `OUTDOORS` comes last if it shows."""
        rotation, position = c2w[:3, :3], c2w[:3, 3]
        windows = self._windows((self._corners - position) @ rotation)
        inside = (np.clip(position, self._lows, self._highs) == position).all(1).tolist()
        x, y = self._reach
        home = self._home(position)
        seen: dict[int, None] = {}

        def look(room: int, view: Window, path: frozenset[int]) -> None:
            seen[room] = None
            if room == OUTDOORS or self.scene.rooms[room].kind == "court":
                seen[OUTDOORS] = None
            if room == OUTDOORS:
                return
            for number, beyond in self._ways[room]:
                narrowed = view if inside[number] else _overlap(view, windows[number])
                if beyond not in path and narrowed is not None:
                    look(beyond, narrowed, path | {beyond})

        look(home, (-x, -y, x, y), frozenset({home}))
        outdoors = [OUTDOORS] if OUTDOORS in seen else []
        return [room for room in seen if room != OUTDOORS] + outdoors

    def _home(self, position: np.ndarray) -> int:
        """Return the room round a position, or the nearest one (within a wall, in a doorway)."""
        lows, highs = (np.array([getattr(room, end) for room in self.scene.rooms]) for end in ("low", "high"))
        away = np.maximum(np.maximum(lows - position, position - highs), 0)[:, [0, 2]]
        return int(np.linalg.norm(away, axis=1).argmin())

    def _windows(self, corners: np.ndarray) -> list[Window | None]:
        """Return the part of the picture each opening covers; None if it lies behind. corners: (n, 8, 3)."""
        depth = corners[..., 2]
        flat = corners[..., :2] / np.maximum(depth, NEAR)[..., None]
        left_top, right_bottom = flat.min(1), flat.max(1)
        near = np.less(depth, NEAR)
        whole, behind = near.any(1), near.all(1)
        left_top[whole], right_bottom[whole] = -np.inf, np.inf
        rows = np.concatenate([left_top, right_bottom], axis=1).tolist()
        return [None if hidden else tuple(row) for row, hidden in zip(rows, behind.tolist(), strict=True)]


def _overlap(a: Window, b: Window | None) -> Window | None:
    if b is None:
        return None
    left, top, right, bottom = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (left, top, right, bottom) if left < right and top < bottom else None
