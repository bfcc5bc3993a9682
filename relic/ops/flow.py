"""Flow matching, stated once: xt = (1 − sigma)·x0 + sigma·noise, velocity = noise − x0, timestep =
1000·sigma.

sigma is analytic and has one level per latent frame, (b, t) in [0, 1]; it is never looked up in a grid.
Latents are (b, t, c, h, w). Sensitive steps run in float32 at least and return the input's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

__all__ = [
    "add_noise",
    "euler_step",
    "guide",
    "shift_sigma",
    "sigma_schedule",
    "steps_to",
    "timestep_of",
    "velocity_of",
    "x0_of",
]


def _per_latent(sigma: Tensor, like: Tensor) -> Tensor:
    """Shape sigma (b, t) or a scalar for broadcasting against latents."""
    sigma = torch.as_tensor(sigma, device=like.device)
    if sigma.ndim == 2:
        sigma = rearrange(sigma, "b t -> b t 1 1 1")
    return sigma.to(torch.promote_types(like.dtype, torch.float32))


def timestep_of(sigma: Tensor) -> Tensor:
    """Return the number in [0, 1000] that a pretrained time embedding is fed."""
    return 1000.0 * sigma


def shift_sigma(u: Tensor, *, shift: float) -> Tensor:
    """Warp u in [0, 1] towards noise: sigma = shift·u / (1 + (shift − 1)·u). shift = 1 changes nothing."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def sigma_schedule(steps: int, *, shift: float) -> Tensor:
    """Return the `steps + 1` levels of an Euler solution from 1 down to 0, float64: evenly spaced, then
    shifted.
    """
    return shift_sigma(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift=shift)


def steps_to(levels: Sequence[float], *, steps: int, shift: float) -> tuple[int, ...]:
    """Return after how many steps of `sigma_schedule(steps, shift=shift)` it stands at each of `levels`.

    Raises:
        ValueError: If it passes one by, with numbers of steps that would not.
    """
    # undo the shift: there the grid is even
    done = [1.0 - level / (shift - (shift - 1.0) * level) for level in levels]

    def hits(count: int) -> bool:
        return all(abs(part * count - round(part * count)) < 1e-9 * count for part in done)

    if not hits(steps):
        counts = [count for count in range(1, 4 * steps + 100) if hits(count)]
        near = sorted(sorted(counts, key=lambda count: abs(count - steps))[:2])
        remedy = f"use {' or '.join(map(str, near))} steps" if near else "use the shift that made the levels"
        raise ValueError(
            f"{steps} steps shifted by {shift:g} don't stand at all of the levels "
            f"{', '.join(f'{level:.6g}' for level in levels)}; {remedy}."
        )
    return tuple(round(part * steps) for part in done)


def add_noise(x0: Tensor, noise: Tensor, *, sigma: Tensor) -> Tensor:
    """Interpolate clean latents to noise level sigma."""
    level = _per_latent(sigma, x0)
    return ((1.0 - level) * x0 + level * noise).to(x0.dtype)


def velocity_of(x0: Tensor, noise: Tensor) -> Tensor:
    """Return the regression target noise − x0."""
    return noise - x0


def x0_of(xt: Tensor, velocity: Tensor, *, sigma: Tensor) -> Tensor:
    """Return the clean latents that (xt, velocity) stand for: x0 = xt − sigma·velocity."""
    return (xt - _per_latent(sigma, xt) * velocity).to(xt.dtype)


def euler_step(xt: Tensor, velocity: Tensor, *, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Walk along the velocity from sigma to next_sigma."""
    return (xt + (_per_latent(next_sigma, xt) - _per_latent(sigma, xt)) * velocity).to(xt.dtype)


def guide(cond: Tensor, uncond: Tensor, *, scale: float) -> Tensor:
    """Apply classifier-free guidance; scale = 1 means none."""
    return uncond + scale * (cond - uncond)
