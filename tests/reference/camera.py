"""Cameras the slow way: numpy, one frame at a time, elementary matrices. Imports nothing from relic."""

from __future__ import annotations

import numpy as np

AXES = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}  # the plane that a turn about each axis acts in


def turn(axis: str, degrees: float) -> np.ndarray:
    """The right-handed rotation about one axis, (3, 3)."""
    first, second = AXES[axis]
    matrix, angle = np.eye(3), np.deg2rad(degrees)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def pose(rotation: np.ndarray, position: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, position
    return matrix


def chain(motions: np.ndarray) -> np.ndarray:
    """Multiply motions (f, 4, 4) one after the other into poses (f, 4, 4)."""
    current, poses = np.eye(4), []
    for motion in motions:
        current = current @ motion
        poses.append(current)
    return np.stack(poses)


def motion_of(action: np.ndarray) -> np.ndarray:
    """The motion (4, 4) of one action (13,), written out from the meaning of each channel."""
    (dolly_in, dolly_out, truck_left, truck_right, pedestal_up, pedestal_down) = action[:6]
    (tilt_up, tilt_down, pan_left, pan_right, roll_cw, roll_ccw) = action[6:12]
    step = np.array([truck_right - truck_left, pedestal_down - pedestal_up, dolly_in - dolly_out])
    rotation = (
        turn("y", pan_right - pan_left) @ turn("x", tilt_up - tilt_down) @ turn("z", roll_cw - roll_ccw)
    )
    return pose(rotation, step)


def unreal_axes(pitch: float, yaw: float, roll: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The forward, right and up vectors of an Unreal camera in Unreal's left-handed world (X, Y, Z up).

    Rolled first, then pitched, then yawed. Yaw takes X to Y, pitch takes X to Z, roll takes Y to −Z.
    """
    (sp, sy, sr), (cp, cy, cr) = (
        np.sin(np.deg2rad([pitch, yaw, roll])),
        np.cos(np.deg2rad([pitch, yaw, roll])),
    )
    yawed = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    pitched = np.array([[cp, 0, -sp], [0, 1, 0], [sp, 0, cp]])
    rolled = np.array([[1, 0, 0], [0, cr, sr], [0, -sr, cr]])
    forward, right, up = (yawed @ pitched @ rolled).T
    return forward, right, up


def opengl_pixel(point: np.ndarray, c2w_gl: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Where an OpenGL camera (x right, y up, looking along −z) sees a world point, rows counted downwards."""
    x, y, z = c2w_gl[:3, :3].T @ (point - c2w_gl[:3, 3])
    fx, fy, cx, cy = intrinsics
    return np.array([cx + fx * x / -z, cy - fy * y / -z])
