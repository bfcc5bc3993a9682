"""Trajectory errors the slow way: numpy, one motion at a time. Imports nothing from relic."""

from __future__ import annotations

import numpy as np


def similarity(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Scale, rotation and shift that take points (n, 3) nearest to others: Horn's quaternion, 1987."""
    a, b = source - source.mean(0), target - target.mean(0)
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = a.T @ b
    table = np.array([
        [xx + yy + zz, yz - zy, zx - xz, xy - yx],
        [yz - zy, xx - yy - zz, xy + yx, zx + xz],
        [zx - xz, xy + yx, yy - xx - zz, yz + zy],
        [xy - yx, zx + xz, yz + zy, zz - xx - yy],
    ])  # fmt: skip
    w, x, y, z = np.linalg.eigh(table)[1][:, -1]
    rotation = np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip
    scale = sum(float(q @ rotation @ p) for p, q in zip(a, b, strict=True)) / float((a * a).sum())
    return scale, rotation, target.mean(0) - scale * rotation @ source.mean(0)


def aligned(estimated: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Estimated poses (f, 4, 4) laid over true ones; frames of NaN stay so."""
    seen = [i for i in range(len(truth)) if not np.isnan(estimated[i]).any()]
    scale, rotation, shift = similarity(estimated[seen, :3, 3], truth[seen, :3, 3])
    result = estimated.copy()
    for i in seen:
        result[i, :3, :3] = rotation @ estimated[i, :3, :3]
        result[i, :3, 3] = scale * rotation @ estimated[i, :3, 3] + shift
    return result


def relative_errors(estimated: np.ndarray, truth: np.ndarray, delta: int) -> list[tuple[int, float, float]]:
    """First frame, translation and degrees of every motion over `delta` frames that has both poses."""
    estimated, rows = aligned(estimated, truth), []
    for i in range(len(truth) - delta):
        if np.isnan(estimated[[i, i + delta]]).any():
            continue
        true = np.linalg.inv(truth[i]) @ truth[i + delta]
        found = np.linalg.inv(estimated[i]) @ estimated[i + delta]
        error = np.linalg.inv(true) @ found
        cosine = np.clip((np.trace(error[:3, :3]) - 1) / 2, -1, 1)
        rows.append((i, float(np.linalg.norm(error[:3, 3])), float(np.degrees(np.arccos(cosine)))))
    return rows


def trajectory_error(estimated: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square distance of camera centres after alignment."""
    estimated = aligned(estimated, truth)
    squares = [
        float(((p[:3, 3] - q[:3, 3]) ** 2).sum())
        for p, q in zip(estimated, truth, strict=True)
        if not np.isnan(p).any()
    ]
    return float(np.sqrt(np.mean(squares)))
