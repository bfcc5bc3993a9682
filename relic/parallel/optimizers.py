"""Optimisers whose state exists before their first step."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["primed"]


@torch.no_grad()
def primed(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give a fresh optimiser its state, all zeros, weights untouched; return it.

    Reading the state of an optimiser without one, torch's distributed checkpoints have it take a step with a
    gradient of zero, which counts in Adam's bias corrections: saving would change the run. Of an optimiser
    that waits for its first step while another one trains, that is no rare case.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    return optimizer
