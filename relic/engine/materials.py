"""Colours by name, and patterns painted on surfaces: large and soft, for small pictures to carry."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import numpy as np

from relic.ops.randomness import derive_seed

__all__ = ["COLOURS", "PATTERNS", "TEXTURE_SIDE", "Material", "paint", "plain"]

TEXTURE_SIDE: Final = 128  # texels: a power of two, which the software rasteriser asks for

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (196, 52, 44), "orange": (226, 128, 44), "yellow": (232, 196, 72), "green": (78, 148, 72),
    "teal": (44, 138, 140), "blue": (58, 98, 184), "purple": (122, 74, 152), "pink": (226, 140, 160),
    "brown": (128, 84, 52), "beige": (214, 196, 160), "grey": (142, 146, 150), "white": (236, 232, 224),
    "black": (48, 46, 50),
}  # fmt: skip

PATTERNS: Final = (
    "plain", "stripes", "bands", "checks", "spots", "waves", "planks", "panelled", "leaves", "painting",
)  # fmt: skip
Pattern = Literal[
    "plain", "stripes", "bands", "checks", "spots", "waves", "planks", "panelled", "leaves", "painting"
]


@dataclass(frozen=True)
class Material:
    """What a surface looks like.

    Args:
        colour: Its main colour, the one a caption names.
        pattern: How the two colours are laid out.
        second: The other colour; for "painting", ignored.
        period: Metres after which the pattern repeats; None stretches it once over each face.
        seed: Varies "painting" and "leaves".
        glow: Whether it is lit from inside (lamps, far things), so no shadow falls on it.
    """

    colour: str
    pattern: Pattern = "plain"
    second: str = "white"
    period: float | None = 1.6
    seed: int = 0
    glow: bool = False


def plain(colour: str, *, glow: bool = False) -> Material:
    """Return a surface of one colour."""
    return Material(colour, glow=glow)


def paint(material: Material) -> np.ndarray:
    """Paint the texture of a patterned material, (TEXTURE_SIDE, TEXTURE_SIDE, 3) uint8, row 0 on top."""
    return _paint(material.pattern, material.colour, material.second, material.seed)


@lru_cache(maxsize=256)
def _paint(pattern: Pattern, colour: str, second: str, seed: int) -> np.ndarray:
    axis = (np.arange(TEXTURE_SIDE) + 0.5) / TEXTURE_SIDE
    v, u = np.meshgrid(axis, axis, indexing="ij")
    first_rgb, second_rgb = (np.array(COLOURS[name], np.float64) for name in (colour, second))
    if pattern == "painting":
        return _painting(u, v, seed)
    share = _share(pattern, u, v, seed)[..., None]
    return np.clip(first_rgb + (second_rgb - first_rgb) * share, 0, 255).round().astype(np.uint8)


def _share(pattern: Pattern, u: np.ndarray, v: np.ndarray, seed: int) -> np.ndarray:
    """Return how much of the second colour shows, 0 to 1. u runs right, v down, 0 to 1 over a period."""
    if pattern == "stripes":
        return _step(np.sin(2 * np.pi * u), soft=0.12)
    if pattern == "bands":
        return _step(np.sin(2 * np.pi * v), soft=0.12)
    if pattern == "checks":
        return _step(np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v), soft=0.08)
    if pattern == "spots":
        centres = np.array([(0.25, 0.25), (0.75, 0.75)])
        far = np.min([np.hypot(u - x, v - y) for x, y in centres], axis=0)
        return _step(0.17 - far, soft=0.015)
    if pattern == "waves":
        return 0.5 + 0.5 * np.sin(2 * np.pi * (v + 0.12 * np.sin(2 * np.pi * u)))
    if pattern == "planks":  # boards along u, each its own shade, with a dark seam
        board = np.floor(v * 4).astype(int)
        shade = np.array([0.10, 0.34, 0.0, 0.24])[board]
        return shade + 0.1 * np.sin(2 * np.pi * (u + 0.3 * board)) ** 2
    if pattern == "panelled":  # a wall: the lower third and a border in the second colour
        return np.maximum(_step(v - 0.66, soft=0.01), _step(0.05 - v, soft=0.01))
    if pattern == "leaves":
        return _soft_noise(u, v, seed)
    return np.zeros_like(u)


def _painting(u: np.ndarray, v: np.ndarray, seed: int) -> np.ndarray:
    """Paint an abstract picture of a few big shapes, different for every seed."""
    rng = np.random.default_rng(derive_seed("painting", seed))
    names = rng.permutation([name for name in COLOURS if name not in ("grey", "beige")])
    rgb = [np.array(COLOURS[name], np.float64) for name in names]
    tilt = rng.uniform(-0.5, 0.5)
    picture = rgb[0] + (rgb[1] - rgb[0]) * _step(v - 0.5 - tilt * (u - 0.5), soft=0.02)[..., None]
    for layer in range(2 + int(rng.integers(2))):
        x, y, size = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.14, 0.28)
        if rng.random() < 0.6:
            inside = size - np.hypot(u - x, v - y)
        else:
            inside = size - np.maximum(np.abs(u - x), np.abs(v - y))
        picture = picture + (rgb[2 + layer] - picture) * _step(inside, soft=0.015)[..., None]
    return np.clip(picture, 0, 255).round().astype(np.uint8)


def _soft_noise(u: np.ndarray, v: np.ndarray, seed: int) -> np.ndarray:
    """Sum a few periodic waves of low frequency into blotches, 0 to 1."""
    rng = np.random.default_rng(derive_seed("leaves", seed))
    total = np.zeros_like(u)
    for _ in range(6):
        fx, fy = rng.integers(1, 4, 2) * rng.choice([-1, 1], 2)
        total += np.sin(2 * np.pi * (fx * u + fy * v + rng.random()))
    return 0.5 * _step(total, soft=2.5)


def _step(x: np.ndarray, *, soft: float) -> np.ndarray:
    """Step from 0 to 1 at x = 0 over a width of `soft`."""
    ramp = np.clip(0.5 + x / (2 * soft), 0.0, 1.0)
    return ramp * ramp * (3 - 2 * ramp)
