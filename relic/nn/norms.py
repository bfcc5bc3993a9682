"""The norms of a DiT and the modulation that follows them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LayerNorm", "RMSNorm", "modulate"]


def modulate(x: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x·(1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of the residual stream, whatever dtype its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """RMS norm over the whole width, all heads jointly; computed in float32 inside one kernel."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
