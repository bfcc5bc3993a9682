"""Structural similarity and sharpness the slow way: numpy, window by window. Imports nothing from relic."""

from __future__ import annotations

import numpy as np


def window(size: int = 11, sigma: float = 1.5) -> np.ndarray:
    """A Gaussian window (size, size) that sums to one."""
    offsets = np.arange(size) - size // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The mean structural similarity of two uint8 pictures (h, w, 3), borders reflected."""
    weights, values = window(), []
    side = len(weights)
    a, b = (np.pad(p, ((side // 2,) * 2, (side // 2,) * 2, (0, 0)), mode="reflect") for p in (a, b))
    for colour in range(3):
        for row in range(a.shape[0] - side + 1):
            for column in range(a.shape[1] - side + 1):
                place = np.s_[row : row + side, column : column + side, colour]
                x, y = a[place].astype(float), b[place].astype(float)
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def sharpness(picture: np.ndarray) -> float:
    """The deviation of the Laplacian of luma, of a uint8 picture (h, w, 3), in grey levels."""
    grey = picture.astype(float) @ np.array([0.299, 0.587, 0.114])
    values = [
        grey[r, c - 1] + grey[r, c + 1] + grey[r - 1, c] + grey[r + 1, c] - 4 * grey[r, c]
        for r in range(1, grey.shape[0] - 1)
        for c in range(1, grey.shape[1] - 1)
    ]
    return float(np.std(values))
