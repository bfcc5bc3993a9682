"""Pixels: uint8 (f, h, w, 3) on disk and on screens, float in [-1, 1] and channels first for networks."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["from_uint8", "psnr", "to_uint8"]


def from_uint8(video: Tensor) -> Tensor:
    """Map uint8 (..., 3, h, w) to float32 in [-1, 1]."""
    return video.float() / 127.5 - 1.0


def to_uint8(video: Tensor) -> Tensor:
    """Map float (..., 3, h, w) in [-1, 1] to uint8 (..., h, w, 3), rounding and clipping."""
    scaled = ((video.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(scaled, "... c h w -> ... h w c")


def psnr(video: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each frame in dB, 148 if equal.

    video, truth: uint8 (f, h, w, 3) -> (f,) float32.

    Raises:
        ValueError: If shapes differ.
    """
    if video.shape != truth.shape:
        raise ValueError(
            f"psnr compares videos of one shape, got {tuple(video.shape)} and {tuple(truth.shape)}; cut both "
            "to the frames that belong together."
        )
    error = (video.float() - truth.float()).square().mean((-3, -2, -1))
    return 10.0 * torch.log10(255.0**2 / error.clamp(min=1e-10))
