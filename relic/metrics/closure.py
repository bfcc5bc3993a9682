"""Memory scores of other benchmarks, for comparison: MIND's LCM and GSC, Echo's loop closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from relic.metrics.similarity import by_chunks, check_same, check_video, psnr, ssim

__all__ = ["Closeness", "loop_closure", "mind_gsc", "mind_lcm"]

FrameScore = Callable[[Tensor, Tensor], Tensor]


class Closeness(NamedTuple):
    """Means over frames: mse of pixels in [0, 1], psnr in dB, ssim, lpips (None if not measured)."""

    mse: float
    psnr: float
    ssim: float
    lpips: float | None


def mind_lcm(
    generated: Tensor, truth: Tensor, *, context_frames: int, lpips: FrameScore | None = None
) -> Closeness:
    """Return MIND's long-context memory: generated against true frames from `context_frames` on.

    A score for each frame, then their mean. Equal frames count 148 dB here and infinitely many there.
    generated, truth: uint8 (f, h, w, 3), the context included.

    Raises:
        ValueError: If lengths differ or the context leaves nothing to score.
    """
    check_same(generated, truth, name="generated")
    if not 0 <= context_frames < len(generated):
        raise ValueError(
            f"context_frames={context_frames} of {len(generated)} frames leaves nothing to score; give the "
            "frame at which generation starts."
        )
    return _closeness(generated[context_frames:], truth[context_frames:], lpips)


def mind_gsc(generated: Tensor, *, lpips: FrameScore | None = None) -> Closeness:
    """Return MIND's generated-scene consistency: frame i against frame N−1−i of a path and its exact reverse.

    It needs no truth, and says nothing of motion: a frozen video scores best. generated: uint8 (N, h, w, 3).

    Raises:
        ValueError: If N is odd.
    """
    check_video(generated, name="generated")
    half, rest = divmod(len(generated), 2)
    if rest:
        raise ValueError(
            f"generated has {len(generated)} frames; a path and its exact reverse have an even number: leave "
            "out the true first frame, or the one at the turning point."
        )
    return _closeness(generated[:half], generated[half:].flip(0), lpips)


def loop_closure(generated: Tensor, *, lpips: FrameScore | None = None) -> Closeness:
    """Return Echo-Memory's loop closure: the first frame against the last one of a closed path.

    Nothing is aligned, and a frozen video scores best. generated: uint8 (f, h, w, 3).

    Raises:
        ValueError: If there are fewer than two frames.
    """
    check_video(generated, name="generated")
    if len(generated) < 2:
        raise ValueError("A loop needs at least two frames, its first and its last.")
    return _closeness(generated[-1:], generated[:1], lpips)


def _closeness(video: Tensor, truth: Tensor, lpips: FrameScore | None) -> Closeness:
    decibels = by_chunks(psnr, video, truth)
    return Closeness(
        mse=float((10 ** (-decibels.double() / 10)).mean()),
        psnr=float(decibels.mean()),
        ssim=float(ssim(video, truth).mean()),
        lpips=None if lpips is None else float(lpips(video, truth).mean()),
    )
