"""Training objectives as pure functions, and how noise levels are drawn and weighted for them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import reduce
from torch import Tensor

from relic.ops.flow import shift_sigma

__all__ = [
    "LEVEL_SAMPLINGS",
    "LEVEL_WEIGHTINGS",
    "draw_sigma",
    "flow_matching_loss",
    "level_weight",
    "ode_regression_loss",
]

Sampling = Literal["uniform", "logit_normal"]
Weighting = Literal["none", "bell"]
LEVEL_SAMPLINGS: tuple[Sampling, ...] = ("uniform", "logit_normal")
LEVEL_WEIGHTINGS: tuple[Weighting, ...] = ("none", "bell")


def draw_sigma(u: Tensor, *, sampling: Sampling, shift: float) -> Tensor:
    """Turn uniform draws u in [0, 1) into noise levels.

    `uniform` keeps u, `logit_normal` is the sigmoid of a standard normal; both are then shifted.
    """
    if sampling == "logit_normal":
        u = torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7)).sigmoid()
    return shift_sigma(u, shift=shift)


def level_weight(sigma: Tensor, *, weighting: Weighting) -> Tensor:
    """Return the loss weight of each noise level.

    `bell` is the weighting public Wan fine-tunes use: exp(−2·(sigma − ½)²) less its minimum, with mean 1 over
    sigma uniform in [0, 1].
    """
    if weighting == "none":
        return torch.ones_like(sigma)
    floor = math.exp(-0.5)
    mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - floor
    return (torch.exp(-2.0 * (sigma - 0.5).square()) - floor) / mean


def flow_matching_loss(velocity: Tensor, target: Tensor, *, weight: Tensor) -> Tensor:
    """Return the weighted mean squared error per sample, (b,).

    velocity, target: (b, t, c, h, w); weight: (b, t), zero for latent frames that are out of the loss. The
    mean runs over the latent frames with non-zero weight.
    """
    error = reduce((velocity.float() - target.float()).square(), "b t c h w -> b t", "mean")
    counted = (weight != 0).sum(1).clamp(min=1)
    return (weight * error).sum(1) / counted


def ode_regression_loss(x0: Tensor, end: Tensor, *, weight: Tensor) -> Tensor:
    """Return the weighted mean squared error per sample, (b,), of clean latents that are predicted from
    states of an ODE's solutions, against the ends of those solutions (paper §4.4).

    x0, end: (b, t, c, h, w); weight: (b, t), as in `flow_matching_loss`.
    """
    return flow_matching_loss(x0, end, weight=weight)
