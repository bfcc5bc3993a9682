"""Solids as triangles with baked light: arrays only, no renderer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from relic.engine.materials import COLOURS
from relic.engine.scenes import Room, Solid

__all__ = ["Light", "Mesh", "join", "mesh_of", "outdoor_light", "room_light"]

PATCH: Final = 1.6  # m: larger faces are divided, so that light can vary over them
MOST_PATCHES: Final = 6  # along a side
ROUND: Final = 14  # sides of round things
SUN: Final = np.array([0.45, -0.75, -0.48])  # towards the sun; y is down

Light = Callable[[np.ndarray, np.ndarray], np.ndarray]  # points (n, 3), normals (n, 3) -> RGB factors (n, 3)


class Mesh(NamedTuple):
    """Triangles of one material. points (n, 3) metres, rgb (n, 3) 0 to 1, uv (n, 2), triangles (m, 3)."""

    points: np.ndarray
    rgb: np.ndarray
    uv: np.ndarray
    triangles: np.ndarray


def room_light(room: Room) -> Light:
    """Return the light of a room: a lamp, and an ambience that tells the directions of walls apart."""
    if room.kind == "court":
        return outdoor_light
    lamp, tint = np.array(room.lamp), np.array(room.tint)

    def light(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        way = lamp - points
        far = np.linalg.norm(way, axis=1)
        facing = np.clip((normals * way).sum(1) / np.maximum(far, 1e-6), 0, 1)
        side = normals @ np.array([0.05, -0.04, 0.02])
        return (0.56 + side + 0.5 * facing / (1 + (far / 4.5) ** 2))[:, None] * tint

    return light


def outdoor_light(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Return the light of sun and sky."""
    return np.repeat((0.66 + 0.34 * np.clip(normals @ SUN, 0, 1))[:, None], 3, axis=1)


def mesh_of(solid: Solid, light: Light) -> Mesh:
    """Cut a solid into triangles, lit. Points run counter-clockwise seen from outside."""
    shapes = {"box": _box, "cylinder": _turned, "cone": _turned, "sphere": _turned}
    points, normals, uv, triangles = shapes[solid.shape](solid)
    rgb = np.ones_like(points) if solid.material.glow else light(points, normals)
    if solid.material.pattern == "plain":
        rgb = rgb * (np.array(COLOURS[solid.material.colour]) / 255)
    return Mesh(points, np.clip(rgb, 0, 1), uv, triangles)


def join(meshes: list[Mesh]) -> Mesh:
    """Make one mesh of many."""
    starts = np.cumsum([0] + [len(mesh.points) for mesh in meshes[:-1]])
    triangles = [mesh.triangles + start for mesh, start in zip(meshes, starts, strict=True)]
    points, rgb, uv = (np.concatenate(parts) for parts in list(zip(*meshes, strict=True))[:3])
    return Mesh(points, rgb, uv, np.concatenate(triangles))


def _box(solid: Solid) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    low, high = np.array(solid.low), np.array(solid.high)
    faces, count = [], 0
    for axis in range(3):
        a, b = [(2, 1), (0, 2), (0, 1)][axis]  # the face's u and v axes
        for sign in (-1, 1):
            if axis == 1 and sign == 1 and high[1] >= 0:
                continue  # stands on the ground
            cells = [min(MOST_PATCHES, max(1, round(float(high[k] - low[k]) / PATCH))) for k in (a, b)]
            s, t = np.meshgrid(*(np.linspace(0, 1, n + 1) for n in cells), indexing="ij")
            points = np.empty((s.size, 3))
            points[:, axis] = (low if sign < 0 else high)[axis]
            points[:, a] = low[a] + s.ravel() * (high[a] - low[a])
            points[:, b] = low[b] + t.ravel() * (high[b] - low[b])
            normals = np.zeros_like(points)
            normals[:, axis] = sign
            period = solid.material.period
            uv = np.stack([s.ravel(), t.ravel()], 1) if period is None else points[:, [a, b]] / period
            corner = np.arange(s.size).reshape(s.shape)
            quads = [corner[:-1, :-1], corner[1:, :-1], corner[1:, 1:], corner[:-1, 1:]]
            p, q, r, o = (quad.ravel() for quad in quads)
            triangles = np.concatenate([np.stack([p, q, r], 1), np.stack([p, r, o], 1)])
            # u × v points along +axis for (0, 1) only
            if (sign > 0) != (axis == 2):
                triangles = triangles[:, ::-1]
            faces.append((points, normals, uv, triangles + count))
            count += len(points)
    points, normals, uv, triangles = (np.concatenate(parts) for parts in zip(*faces, strict=True))
    return points, normals, uv, triangles


def _turned(solid: Solid) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Build a body of revolution about the vertical: rings of radius r at height h, 0 (bottom) to 1."""
    low, high = np.array(solid.low), np.array(solid.high)
    centre, half = (low + high) / 2, (high - low) / 2
    slope = half[0] / max(high[1] - low[1], 1e-6)
    # rings of (radius, height, normal outward, normal upward)
    if solid.shape == "sphere":
        turn = np.linspace(-np.pi / 2, np.pi / 2, 8)
        rings = [(np.cos(e), 0.5 + 0.5 * np.sin(e), np.cos(e), np.sin(e)) for e in turn]
    elif solid.shape == "cone":
        rings = [
            (0.0, 0.0, 0.0, -1.0),
            (1.0, 0.0, 0.0, -1.0),
            (1.0, 0.0, 1.0, slope),
            (0.02, 1.0, 1.0, slope),
        ]
    else:
        rings = [(0.0, 0.0, 0.0, -1.0), (1.0, 0.0, 0.0, -1.0), (1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.0),
                 (1.0, 1.0, 0.0, 1.0), (0.0, 1.0, 0.0, 1.0)]  # fmt: skip
    radius, height, out, up = np.array(rings).T[:, :, None]
    angle = np.linspace(0, 2 * np.pi, ROUND + 1)[None]
    x = centre[0] + half[0] * radius * np.cos(angle)
    z = centre[2] + half[2] * radius * np.sin(angle)
    y = np.broadcast_to(high[1] - height * (high[1] - low[1]), x.shape)
    points = np.stack([x, y, z], -1).reshape(-1, 3)
    normals = np.stack([out * np.cos(angle), np.broadcast_to(-up, x.shape), out * np.sin(angle)], -1).reshape(
        -1, 3
    )
    normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    period = solid.material.period or 1.0
    around = max(1, round(2 * np.pi * half[0] / period))
    uv = np.stack([np.broadcast_to(angle / (2 * np.pi) * around, x.shape), y / period], -1).reshape(-1, 2)
    corner = np.arange(len(points)).reshape(x.shape)
    p, q, r, o = (c.ravel() for c in (corner[:-1, :-1], corner[:-1, 1:], corner[1:, 1:], corner[1:, :-1]))
    triangles = np.concatenate([np.stack([p, q, r], 1), np.stack([p, r, o], 1)])
    return points, normals, uv, triangles
