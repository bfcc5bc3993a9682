"""A camera on smooth legs: it takes up wanted speeds with inertia and brakes before obstacles."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from relic.engine.space import FreeSpace
from relic.ops.actions import KEY_TURN_DEG

__all__ = ["STEP_M", "Walker", "angles_of", "turned"]

INERTIA_S: Final = 0.12  # of each of two low-pass filters
BRAKE_S: Final = 0.3  # a camera is never faster than what is free ahead over this
STEP_M: Final = 0.055  # a step that counts as one frame of a held key


class Walker:
    """A camera and all its poses so far.

    Args:
        space: Where it may be.
        pose: Its first pose (4, 4), in free space.
        fps: Frames a second.
    """

    def __init__(self, space: FreeSpace, pose: np.ndarray, *, fps: float) -> None:
        self.space = space
        self.dt = 1 / fps
        self.poses = [pose]
        self.usage = np.zeros((6, 2))  # frames of a held key: x y z pan tilt roll, positive and negative
        self._speed = np.zeros((2, 6))  # both filters: m/s along x y z, degrees/s of pan tilt roll
        self._follow = 1 - math.exp(-self.dt / INERTIA_S)

    @property
    def pose(self) -> np.ndarray:
        """The present pose (4, 4)."""
        return self.poses[-1]

    @property
    def position(self) -> np.ndarray:
        return self.pose[:3, 3]

    @property
    def rotation(self) -> np.ndarray:
        return self.pose[:3, :3]

    @property
    def angles_deg(self) -> tuple[float, float, float]:
        """Pan, tilt and roll against the level, degrees."""
        return angles_of(self.rotation)

    @property
    def is_resting(self) -> bool:
        """Whether it has come to rest, but for a hair."""
        return bool((np.abs(self._speed[1]) < (0.02, 0.02, 0.02, 0.5, 0.5, 0.5)).all())

    def move(self, wanted: np.ndarray) -> None:
        """Add one frame. wanted: (6,) m/s right, down, forward in its own axes; degrees/s pan, tilt, roll."""
        self._speed[0] += self._follow * (wanted - self._speed[0])
        self._speed[1] += self._follow * (self._speed[0] - self._speed[1])
        self._brake()
        pose = self.pose.copy()
        pose[:3, 3] += self.rotation @ self._speed[1, :3] * self.dt
        if not self.space.is_free(pose[:3, 3]):
            pose[:3, 3] = self.position
            self._speed[:, :3] = 0
        pose[:3, :3] = self.rotation @ turned(*np.radians(self._speed[1, 3:] * self.dt).tolist())
        self._add(pose, self._speed[1])

    def retrace(self, start: int) -> None:
        """Go back exactly the way it came since frame `start`, in reverse."""
        for frame in range(len(self.poses) - 2, start - 1, -1):
            motion = np.linalg.inv(self.pose) @ self.poses[frame]
            turn = np.array(angles_of(motion[:3, :3]))
            self._add(self.poses[frame], np.concatenate([motion[:3, 3], turn]) / self.dt)
        self._speed[:] = 0

    def _brake(self) -> None:
        speed = float(np.linalg.norm(self._speed[1, :3]))
        if speed < 1e-3:
            return
        ahead = self.rotation @ self._speed[1, :3] / speed
        limit = self.space.reach(self.position, ahead, limit=speed * BRAKE_S) / BRAKE_S
        if limit < speed:
            self._speed[:, :3] *= limit / speed

    def _add(self, pose: np.ndarray, speed: np.ndarray) -> None:
        self.poses.append(pose)
        keys = speed * self.dt / ([STEP_M] * 3 + [KEY_TURN_DEG] * 3)
        self.usage[:, 0] += np.maximum(keys, 0)
        self.usage[:, 1] += np.maximum(-keys, 0)


def turned(pan: float, tilt: float, roll: float) -> np.ndarray:
    """Return `relic.ops.camera.rotation_from_angles` of one rotation, radians -> (3, 3), in microseconds."""
    sp, cp, st, ct, sr, cr = (f(a) for a in (pan, tilt, roll) for f in (math.sin, math.cos))
    return np.array([
        [cp * cr + sp * st * sr, sp * st * cr - cp * sr, sp * ct],
        [ct * sr, ct * cr, -st],
        [cp * st * sr - sp * cr, sp * sr + cp * st * cr, cp * ct],
    ])  # fmt: skip


def angles_of(rotation: np.ndarray) -> tuple[float, float, float]:
    """Return pan, tilt and roll in degrees of a rotation (3, 3) away from the vertical."""
    r = rotation
    tilt = math.atan2(-r[1, 2], math.hypot(r[1, 0], r[1, 1]))
    pan, roll = math.atan2(r[0, 2], r[2, 2]), math.atan2(r[1, 0], r[1, 1])
    return math.degrees(pan), math.degrees(tilt), math.degrees(roll)
