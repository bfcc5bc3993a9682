"""Camera paths as a person would fly: keys held and let go, walks, looks away and back, returns."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

from relic.engine.scenes import Scene
from relic.engine.space import CLEARANCE, FreeSpace
from relic.engine.walker import Walker
from relic.ops.camera import rotation_from_angles
from relic.ops.randomness import derive_seed

__all__ = ["make_trajectory"]

HELD_S: Final = (0.5, 2.25)  # how long a key is held
SPEED: Final = (0.5, 1.4)  # m/s
TURN: Final = (16.0, 48.0)  # degrees/s
MOST_TILT_DEG: Final = 32.0
MOST_ROLL_DEG: Final = 26.0
EYE: Final = (1.1, 1.9)  # m above the floor, where a path begins and walks lead
AWAY_S: Final = 4.0  # an old view is worth a return after this


def make_trajectory(scene: Scene, *, seed: int, frames: int, fps: float = 16.0) -> Tensor:
    """Fly through a scene -> c2w (frames, 4, 4) float64, OpenCV axes, metres.

    A pure function of its arguments. Every pose keeps `CLEARANCE` metres from every surface.
    """
    if frames < 1:
        raise ValueError(f"frames={frames} must be at least 1.")
    rng = np.random.default_rng(derive_seed("trajectory", scene.seed, scene.index, seed))
    return torch.from_numpy(np.stack(Pilot(scene, rng, fps=fps).fly(frames)))


class Pilot:
    """Flies a walker by moods, each a few seconds; favours the motions that it has used least."""

    def __init__(self, scene: Scene, rng: np.random.Generator, *, fps: float) -> None:
        self._scene, self._rng = scene, rng
        self._space = FreeSpace(scene, clearance=CLEARANCE)
        self._walker = Walker(self._space, self._start(), fps=fps)
        self._views = [0]  # frames worth coming back to
        self._fps = fps
        self._height = float(rng.uniform(1.3, 1.75))  # of walks: below the lintels of doorways

    def fly(self, frames: int) -> list[np.ndarray]:
        """Return that many poses (4, 4)."""
        moods = (
            (self._play, 0.3), (self._look_and_return, 0.13), (self._go_and_return, 0.1),
            (self._visit, 0.13), (self._come_back, 0.14), (self._circuit, 0.1), (self._look_round, 0.06),
            (self._pause, 0.04),
        )  # fmt: skip
        weights = np.array([weight for _, weight in moods])
        # a recording soon shows a view again, and another room
        opening = [[self._play, self._look_and_return, self._go_and_return][self._rng.integers(3)]]
        opening += [self._look_and_return, self._visit][:: int(self._rng.choice([-1, 1]))]
        if self._rng.random() < 0.4:  # or the same one again, by another way
            opening = [[self._circuit, self._look_round][self._rng.integers(2)], self._play, self._visit]
        while len(self._walker.poses) < frames:
            choice = int(self._rng.choice(len(moods), p=weights / weights.sum()))
            mood = opening.pop(0) if opening else moods[choice][0]
            mood()
            self._level()
            if self._rng.random() < 0.4 and self._outlook() > 1.2:
                self._views.append(len(self._walker.poses) - 1)
        return self._walker.poses[:frames]

    # moods

    def _play(self) -> None:
        for _ in range(int(self._rng.integers(2, 6))):
            self._hold()

    def _look_and_return(self) -> None:
        """Turn away, wait, turn back."""
        start = self._mark()
        for _ in range(int(self._rng.integers(1, 3))):
            self._hold(turning=True, seconds=float(self._rng.uniform(0.9, 2.25)))
        self._rest(float(self._rng.uniform(0, 0.8)))
        self._walker.retrace(start)

    def _go_and_return(self) -> None:
        """Go a few keys away and come back the same way."""
        start = self._mark()
        for _ in range(int(self._rng.integers(1, 4))):
            self._hold()
        self._rest(float(self._rng.uniform(0, 0.8)))
        self._walker.retrace(start)

    def _visit(self) -> None:
        """Walk to another room."""
        goal = self._anywhere(elsewhere=True)
        if goal is not None:
            self._walk(goal)

    def _come_back(self) -> None:
        """Walk to a pose of some time ago and look the same way again."""
        now = len(self._walker.poses)
        old = [frame for frame in self._views if now - frame > AWAY_S * self._fps]
        if not old:
            return self._look_and_return()
        pose = self._walker.poses[old[int(self._rng.integers(len(old)))]]
        if float(np.linalg.norm(pose[:3, 3] - self._walker.position)) > 0.5 and not self._walk(pose[:3, 3]):
            return None
        return self._align(pose)

    def _circuit(self) -> None:
        """Walk by two places near by, back to where it began, and look the same way again."""
        pose, reach = self._walker.pose, float(self._rng.uniform(0.8, 2.0))
        for _ in range(2):
            low, high = pose[:3, 3] - reach, pose[:3, 3] + reach
            low[1], high[1] = -EYE[1], -EYE[0]
            goal = self._space.place(self._rng, low=low, high=high)
            if goal is not None:
                self._walk(goal)
        if self._walk(pose[:3, 3]):
            self._align(pose)

    def _look_round(self) -> None:
        """Turn about once, all the way."""
        rate = float(self._rng.uniform(38, 48)) * float(self._rng.choice([-1, 1]))
        self._steer(np.array([0, 0, 0, rate, 0, 0]), seconds=360 / abs(rate))

    def _pause(self) -> None:
        self._rest(float(self._rng.uniform(0.4, 1.2)))

    # what moods are made of

    def _hold(self, *, turning: bool = False, seconds: float | None = None) -> None:
        """Hold one to three keys, chosen among those that lead somewhere, the least used most likely."""
        seconds = float(self._rng.uniform(*HELD_S)) if seconds is None else seconds
        speeds = np.array([self._rng.uniform(*SPEED)] * 3 + [self._rng.uniform(*TURN)] * 3)
        usage = self._walker.usage + 4.0
        odds = (usage.sum() / usage) ** 1.5
        odds[:3] *= 0.0 if turning else 1.0
        wanted = np.zeros(6)
        for _ in range(1 + int(self._rng.choice(3, p=[0.55, 0.35, 0.1]))):
            for _ in range(8):
                if not odds.any():
                    break
                axis, sense = divmod(int(self._rng.choice(12, p=(odds / odds.sum()).ravel())), 2)
                wanted[axis] = self._allowed(axis, (1 - 2 * sense) * speeds[axis], seconds)
                odds[axis, sense] = 0.0
                if wanted[axis]:
                    odds[axis] = 0.0
                    break
        self._steer(wanted, seconds=seconds)

    def _allowed(self, axis: int, speed: float, seconds: float) -> float:
        """Return how fast a key can be held that long: not into walls, nor beyond a pleasant tilt or roll."""
        if axis < 3:
            way = abs(speed) * seconds
            ahead = self._walker.rotation[:, axis] * np.sign(speed)
            # going forward, stop well short of walls: a wall seen from clearance fills the picture
            free = self._space.reach(self._walker.position, ahead, limit=way + 0.5) - 0.5 * (axis == 2)
            return speed if free > 0.6 * way else 0.0
        _, tilt, roll = self._walker.angles_deg
        if axis == 3:  # a camera that pans while it looks up or down ends up rolled
            return speed if abs(tilt) < 20 else 0.0
        angle, most = [(tilt, MOST_TILT_DEG), (roll, MOST_ROLL_DEG)][axis - 4]
        sense = float(np.sign(speed))
        fastest = max(0.0, (most - sense * angle) / seconds)
        return sense * min(abs(speed), fastest) if fastest > 8 else 0.0

    def _steer(self, wanted: np.ndarray, *, seconds: float) -> None:
        for _ in range(max(1, round(seconds * self._fps))):
            self._walker.move(wanted)

    def _rest(self, seconds: float) -> None:
        while not self._walker.is_resting:
            self._walker.move(np.zeros(6))
        self._steer(np.zeros(6), seconds=seconds) if seconds > 0 else None

    def _mark(self) -> int:
        """Come to rest and return the frame to come back to."""
        self._rest(0)
        return len(self._walker.poses) - 1

    def _level(self) -> None:
        """Bring a strong tilt or roll back, not quite to nothing, perhaps while going on."""
        _, tilt, roll = self._walker.angles_deg
        if max(abs(tilt) / 14, abs(roll) / 8) < 1 and self._rng.random() < 0.7:
            return
        rate, drift = float(self._rng.uniform(18, 34)), np.zeros(6)
        if self._rng.random() < 0.4:
            axis = int(self._rng.integers(3))
            drift[axis] = float(self._rng.uniform(*SPEED)) * float(self._rng.choice([-1, 1]))
        for _ in range(round(2.5 * self._fps)):
            _, tilt, roll = self._walker.angles_deg
            if max(abs(tilt), abs(roll)) < 2:
                break
            self._walker.move(drift + self._upright(rate))

    def _upright(self, rate: float = 30.0) -> np.ndarray:
        """Return the speeds (6,) that bring tilt and roll towards the level."""
        _, tilt, roll = self._walker.angles_deg
        return np.array([0, 0, 0, 0, *np.clip((-2.5 * tilt, -2.5 * roll), -rate, rate)])

    def _walk(self, goal: np.ndarray) -> bool:
        """Walk to a point, looking ahead or at one spot; return whether it was reached."""
        corners = self._space.way(self._walker.position, goal, height=self._height)
        if corners is None:
            return False
        pace = float(self._rng.uniform(0.8, SPEED[1]))
        gaze = self._anywhere() if self._rng.random() < 0.35 else None
        patience, least = 0, math.inf
        while corners:
            to_go = corners[0] - self._walker.position
            far = float(np.linalg.norm(to_go))
            if far < (0.25 if len(corners) == 1 else 0.4):
                corners.pop(0)
                patience, least = 0, math.inf
                continue
            patience, least = (0, far) if far < least - 0.01 else (patience + 1, least)
            if patience > 1.5 * self._fps:
                return False
            look = to_go if gaze is None else gaze - self._walker.position
            pan, _, _ = self._walker.angles_deg
            if np.hypot(look[0], look[2]) < 0.3:  # straight up or down: no direction to face
                look = self._walker.rotation[:, 2]
            bearing = math.degrees(math.atan2(look[0], look[2]))
            off = (bearing - pan + 180) % 360 - 180
            wanted = self._upright()
            wanted[3] = np.clip(2.5 * off, -TURN[1], TURN[1])
            # facing elsewhere than where it goes, a person slows down
            eager = 1.0 if gaze is not None else max(0.12, math.cos(math.radians(min(abs(off), 90.0))))
            wanted[:3] = self._walker.rotation.T @ (to_go / far) * pace * eager * min(1.0, 0.3 + far)
            self._walker.move(wanted)
        return True

    def _align(self, pose: np.ndarray) -> None:
        """Take up a pose near by: position and view."""
        for _ in range(round(8 * self._fps)):
            to_go = self._walker.rotation.T @ (pose[:3, 3] - self._walker.position)
            turn = np.array(_turn_vector(self._walker.rotation.T @ pose[:3, :3]))
            if float(np.linalg.norm(to_go)) < 0.05 and float(np.abs(turn).max()) < 2:
                break
            speed = np.clip(1.8 * to_go, -SPEED[1], SPEED[1])
            self._walker.move(np.concatenate([speed, np.clip(2.0 * turn, -TURN[1], TURN[1])]))

    # places

    def _start(self) -> np.ndarray:
        """Draw a first pose: a free place in some room, level, with something to see."""
        best, most = np.eye(4), -1.0
        while most < 0:
            for _ in range(6):
                point = self._anywhere()
                if point is None:
                    continue
                heading = torch.tensor([self._rng.uniform(-180, 180), 0.0, 0.0], dtype=torch.float64)
                pose = np.eye(4)
                pose[:3, :3], pose[:3, 3] = rotation_from_angles(heading).numpy(), point
                view = self._space.reach(point, pose[:3, 2], limit=3.0)
                if view > most:
                    best, most = pose, view
        return best

    def _anywhere(self, *, elsewhere: bool = False) -> np.ndarray | None:
        """Draw a free point in a random room, with `elsewhere` in one where the camera is not."""
        rooms = self._scene.rooms
        if elsewhere:
            rooms = tuple(room for room in rooms if not room.holds(self._walker.position[None])[0])
        room = rooms[int(self._rng.integers(len(rooms)))]
        low, high = np.array(room.low), np.array(room.high)
        low[1], high[1] = -EYE[1], -EYE[0]
        return self._space.place(self._rng, low=low, high=high)

    def _outlook(self) -> float:
        """Return how far ahead is free, metres up to 3."""
        return self._space.reach(self._walker.position, self._walker.rotation[:, 2], limit=3.0)


def _turn_vector(rotation: np.ndarray) -> tuple[float, float, float]:
    """Return the pan, tilt and roll (degrees) that turn about the same axis as a rotation (3, 3)."""
    axis = np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    sine, cosine = float(np.linalg.norm(axis)), float(np.trace(rotation)) - 1
    x, y, z = axis / max(sine, 1e-9) * math.degrees(math.atan2(sine, cosine))
    return y, x, z
