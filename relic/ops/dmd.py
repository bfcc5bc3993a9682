"""Distribution matching distillation: what a teacher would change about a student's clips (paper §4.4).

Two scores look at a generated clip through the same noise. The difference of what they take for clean is the
gradient of the distance between the student's clips and the teacher's, in latents; no loss need be known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

from relic.ops.flow import shift_sigma

__all__ = ["ScoreLevels", "channel_drift", "dmd_gradient", "mean_error", "with_gradient"]

LEAST_ERROR = 1e-5  # of the teacher, in latents: a clip that it takes for perfect must not divide by zero


@dataclass(frozen=True, kw_only=True)
class ScoreLevels:
    """Noise levels at which clips are scored and the critic is fitted: uniform, shifted, then clamped.

    Args:
        shift: Warp towards noise; 1 for none.
        low: Least level, above 0.
        high: Greatest level, below 1.
    """

    shift: float = 5.0
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        if self.shift < 1.0:
            raise ValueError(f"shift={self.shift} must be at least 1 (none).")
        if not 0.0 < self.low < self.high < 1.0:
            raise ValueError(
                f"low={self.low} and high={self.high} must be levels between 0 and 1, in this order: nothing "
                "can be scored without noise, or without a clip; the published ones are 0.02 and 0.98."
            )

    def __call__(self, u: Tensor) -> Tensor:
        """Turn uniform draws u in [0, 1) into noise levels."""
        return shift_sigma(u, shift=self.shift).clamp(self.low, self.high)


def mean_error(x0: Tensor, predicted: Tensor, *, known: int = 1) -> Tensor:
    """Return the mean absolute error per sample, (b,), of (b, t, c, h, w), without the latents that were
    given: the first `known`.
    """
    return reduce((x0 - predicted)[:, known:].abs(), "b t c h w -> b", "mean")


def dmd_gradient(x0: Tensor, *, fake: Tensor, real: Tensor, known: int = 1) -> Tensor:
    """Return (fake − real) / mean|x0 − real|, the mean per sample; zero in the first `known` latents, which
    were given.

    x0: generated latents (b, t, c, h, w); fake, real: x0 as predicted, from one noisy version of it, by the
    critic and by the teacher, guided. Following this gradient downhill takes x0 from where the student's
    clips are dense to where the teacher's are; the normaliser makes it alike at all noise levels. float32 at
    least.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    x0, fake, real = (x.to(dtype) for x in (x0, fake, real))
    scale = mean_error(x0, real, known=known).clamp(min=LEAST_ERROR)
    gradient = (fake - real) / scale[:, None, None, None, None]
    gradient[:, :known] = 0.0
    return gradient


def with_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Return a scalar whose gradient in x is `gradient` exactly, however x was computed again."""
    return (x.to(gradient.dtype) * gradient.detach()).sum()


def channel_drift(latents: Tensor, *, block_latents: int) -> Tensor:
    """Return how far colours have drifted, (b,): the distance between first and last block of the channels'
    means, root mean square over channels. latents: (b, t, c, h, w), the image and whole blocks.
    """
    first, last = latents[:, 1 : 1 + block_latents], latents[:, -block_latents:]
    means = (reduce(x.float(), "b t c h w -> b c", "mean") for x in (last, first))
    return torch.sub(*means).square().mean(1).sqrt()
