"""Measure inside a run and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(pl_module: LightningModule) -> Iterator[None]:
    """Measure in evaluation mode and without gradients. Modes and global generators are left as they were.

    The run's precision is for the network alone: enter `trainer.precision_plugin.forward_context()` where it
    is called. Under `bf16-true` that context makes bfloat16 the default type, which scores must not have.
    """
    training = {module: module.training for module in pl_module.modules()}
    pl_module.eval()
    try:
        with torch.no_grad(), isolate_rng():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
