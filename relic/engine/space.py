"""Free space: how far a point is from the nearest obstacle, and ways that keep clear of all of them."""

from __future__ import annotations

import heapq
from typing import Final

import numpy as np

from relic.engine.scenes import Scene

__all__ = ["CLEARANCE", "FreeSpace"]

CLEARANCE: Final = 0.3  # m that a camera keeps from every surface
CELL: Final = 0.2  # m of the grid on which ways are sought
SLACK: Final = 0.05  # m by which ways keep further off than they must
LEAST_STEP: Final = 0.02  # m, lest a way along a wall take for ever

Cell = tuple[int, int]


class FreeSpace:
    """The space in which a camera may move.

    Args:
        scene: Whose obstacles and bounds.
        clearance: Metres to keep from every surface.
    """

    def __init__(self, scene: Scene, *, clearance: float = CLEARANCE) -> None:
        self.clearance = clearance
        lows, highs = scene.obstacles
        self._lows, self._highs = np.ascontiguousarray(lows.T), np.ascontiguousarray(highs.T)
        self._low, self._high = np.array(scene.low), np.array(scene.high)
        self._grids: dict[float, np.ndarray] = {}

    def gap(self, point: np.ndarray) -> float:
        """Return metres from a point (3,) to the nearest surface; 0 inside one, negative out of bounds."""
        return float(self.gaps(point[:, None])[0])

    def gaps(self, points: np.ndarray) -> np.ndarray:
        """Return `gap` of many points (3, n) -> (n,)."""
        at = points[:, :, None]
        away = np.maximum(self._lows[:, None] - at, at - self._highs[:, None])
        np.maximum(away, 0, out=away)
        np.multiply(away, away, out=away)
        nearest = np.sqrt((away[0] + away[1] + away[2]).min(1))
        edge = np.minimum(points - self._low[:, None], self._high[:, None] - points).min(0)
        return np.minimum(nearest, edge)

    def is_free(self, point: np.ndarray) -> bool:
        """Return whether a camera may be at a point (3,)."""
        return self.gap(point) >= self.clearance

    def reach(self, point: np.ndarray, direction: np.ndarray, *, limit: float) -> float:
        """Return how many metres, up to `limit`, a camera can go from a free point along a direction (3,)."""
        gone, step = 0.0, LEAST_STEP
        while gone + step < limit:
            spare = self.gap(point + (gone + step) * direction) - self.clearance
            if spare < 0:
                return gone
            gone += step
            step = max(spare, LEAST_STEP)
        return limit

    def place(self, rng: np.random.Generator, *, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
        """Draw a free point (3,) in a box, None if none of many draws is free."""
        for _ in range(60):
            point = rng.uniform(low, high)
            if self.gap(point) >= self.clearance + SLACK:
                return point
        return None

    def way(self, start: np.ndarray, goal: np.ndarray, *, height: float) -> list[np.ndarray] | None:
        """Return corner points, `goal` the last, of a short way; None if there is none.

        The way climbs from `start` to a height (metres above the floor), goes level, and climbs to `goal`.
        """
        above = [np.array([end[0], -height, end[2]]) for end in (start, goal)]
        if not (self._straight(start, above[0]) and self._straight(above[1], goal)):
            return None
        cells = self._search(self._cell(above[0]), self._cell(above[1]), self._grid(height))
        if cells is None:
            return None
        points = [np.array([self._low[0] + i * CELL, -height, self._low[2] + k * CELL]) for i, k in cells]
        points = [above[0], *points[1:-1], above[1]]
        corners, anchor = [above[0]], 0
        for ahead in range(2, len(points)):  # leave out corners that need not be turned
            if not self._straight(points[anchor], points[ahead]):
                anchor = ahead - 1
                corners.append(points[anchor])
        return [*corners, above[1], goal]

    def _straight(self, a: np.ndarray, b: np.ndarray) -> bool:
        length = float(np.linalg.norm(b - a))
        return length < 1e-6 or self.reach(a, (b - a) / length, limit=length) >= length

    def _cell(self, point: np.ndarray) -> Cell:
        i, k = np.round((point - self._low)[[0, 2]] / CELL).astype(int).tolist()
        return i, k

    def _grid(self, height: float) -> np.ndarray:
        """Return which cells are free at a height, (columns, rows) bool."""
        if height not in self._grids:
            columns, rows = (np.arange(self._low[axis], self._high[axis], CELL) for axis in (0, 2))
            points = np.stack(np.broadcast_arrays(columns[:, None], -height, rows), 0)
            free = [self.gaps(column) >= self.clearance + SLACK for column in points.swapaxes(0, 1)]
            self._grids[height] = np.stack(free)
        return self._grids[height]

    def _search(self, start: Cell, goal: Cell, free: np.ndarray) -> list[Cell] | None:
        """Search with A* over eight neighbours."""
        steps = [(i, k, float(np.hypot(i, k))) for i in (-1, 0, 1) for k in (-1, 0, 1) if i or k]
        queue, came, cost = [(0.0, start)], {start: start}, {start: 0.0}
        while queue:
            _, cell = heapq.heappop(queue)
            if cell == goal:
                way = [cell]
                while way[-1] != start:
                    way.append(came[way[-1]])
                return way[::-1]
            for i, k, length in steps:
                beside = (cell[0] + i, cell[1] + k)
                inside = 0 <= beside[0] < free.shape[0] and 0 <= beside[1] < free.shape[1]
                if not inside or (not free[beside] and beside != goal):
                    continue
                spent = cost[cell] + length
                if spent < cost.get(beside, np.inf):
                    cost[beside], came[beside] = spent, cell
                    left = float(np.hypot(goal[0] - beside[0], goal[1] - beside[1]))
                    heapq.heappush(queue, (spent + left, beside))
        return None
