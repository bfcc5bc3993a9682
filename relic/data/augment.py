"""Windows of a recording that are cropped, strided or turned back in time. None of them recomputes d̄."""

from __future__ import annotations

import torch
from torch import Tensor

from relic.ops.actions import encode_actions

__all__ = ["draw_pivot", "palindrome_indices", "stride_between", "window_actions"]


def palindrome_indices(num_frames: int, pivot: int) -> Tensor:
    """Return the frames a time-reversed window shows: f_1..f_t*, f_{t*-1}..f_{2t*-T} (paper §3).

    num_frames: T. pivot: t*, the number of frames before time turns back; T shows the window as it is.
    Returns (T,) int64, counted from 0.

    Raises:
        ValueError: If the pivot is not in [ceil((T+1)/2), T]: the way back would leave the window.
    """
    lowest = (num_frames + 2) // 2
    if not lowest <= pivot <= num_frames:
        raise ValueError(f"pivot={pivot} must be in [{lowest}, {num_frames}] for num_frames={num_frames}.")
    back = torch.arange(pivot - 2, 2 * pivot - num_frames - 2, -1)
    return torch.cat([torch.arange(pivot), back])


def draw_pivot(num_frames: int, *, uniform: float) -> int:
    """Turn a uniform number in [0, 1) into a pivot, every allowed one equally likely."""
    lowest = (num_frames + 2) // 2
    return lowest + int(uniform * (num_frames - lowest + 1))


def window_actions(c2w: Tensor, *, d_bar: float, stride: int = 1, pivot: int | None = None) -> Tensor:
    """Return the actions (f, 13) float32 of a window from its poses; its first frame is static.

    c2w: (f, 4, 4) poses of the window at the strided rate, before any palindrome. d_bar: of the source
        recording at its stored rate; frames `stride` apart move that many times as far. With a pivot, the
        actions of the way back come from the reversed poses.
    """
    if pivot is not None:
        c2w = c2w[palindrome_indices(len(c2w), pivot)]
    return encode_actions(c2w, d_bar=d_bar * stride).float()


def stride_between(stored_fps: float, fps: float) -> int:
    """Return how many stored frames make one frame at `fps`.

    Raises:
        ValueError: If that is no whole number: frames cannot be invented.
    """
    stride = round(stored_fps / fps)
    if stride < 1 or abs(stored_fps - stride * fps) > 1e-3 * fps:
        raise ValueError(
            f"recordings at {stored_fps:g} fps cannot be played at {fps:g}: the ratio must be a whole "
            f"number; set fps to {stored_fps:g} or a divisor of it, or record again."
        )
    return stride
