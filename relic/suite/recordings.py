"""Clips of other benchmarks as a world takes them: cropped, scaled and cut to whole blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from relic.data.video import decode_video
from relic.types import ClipSpec

__all__ = ["Shape", "crop_window", "fit_picture", "read_frames"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the contestants take.

    Args:
        size: Height and width in pixels.
        fps: Frames a second. Recordings are played frame for frame; their own clock is not kept.
        block_frames: Frames of a block.
        most_frames: The longest clip that all of them can play, the image and whole blocks.
        d_bar: Of the worlds, scene units a frame.
    """

    size: tuple[int, int]
    fps: float
    block_frames: int
    most_frames: int
    d_bar: float

    @classmethod
    def of(cls, clip: ClipSpec, *, d_bar: float, most_frames: int) -> Shape:
        """Return it for a world's clip."""
        return cls(
            size=(clip.height, clip.width),
            fps=clip.fps,
            block_frames=4 * clip.block_latents,
            most_frames=most_frames,
            d_bar=d_bar,
        )

    def whole(self, frames: int) -> int:
        """Return the longest whole clip of at most so many frames: the image and whole blocks."""
        return 1 + max(0, min(frames, self.most_frames) - 1) // self.block_frames * self.block_frames


def crop_window(source: tuple[int, int], size: tuple[int, int]) -> tuple[float, int, int, int, int]:
    """Return how the middle of a picture fills another size: scale, scaled height and width, top, left.

    source, size: height and width.
    """
    scale = max(size[0] / source[0], size[1] / source[1])
    height, width = max(size[0], round(source[0] * scale)), max(size[1], round(source[1] * scale))
    return scale, height, width, (height - size[0]) // 2, (width - size[1]) // 2


def fit_picture(intrinsics_px: Tensor, *, source: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return intrinsics `fx fy cx cy` (4,) of pictures that were scaled and cropped to `size`.

    Pixel centres are integers, so edges lie at -0.5.
    """
    scale, _, _, top, left = crop_window(source, size)
    fx, fy, cx, cy = intrinsics_px.tolist()
    centre = [(cx + 0.5) * scale - 0.5 - left, (cy + 0.5) * scale - 0.5 - top]
    return torch.tensor([fx * scale, fy * scale, *centre], dtype=torch.float64)


def read_frames(
    path: Path, *, start: int, stop: int, size: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Read frames [start, stop) of a video, scaled by area and cropped to `size` -> uint8 (f, h, w, 3).

    Also returns the height and width of the source.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or shorter.
    """
    with path.open("rb") as file:
        source = decode_video(file, start=0, stop=1).shape[1:3]
    _, height, width, top, left = crop_window(source, size)
    with path.open("rb") as file:
        video = decode_video(file, start=start, stop=stop, size=(height, width))
    cut = np.ascontiguousarray(video[:, top : top + size[0], left : left + size[1]])
    return torch.from_numpy(cut), (source[0], source[1])
