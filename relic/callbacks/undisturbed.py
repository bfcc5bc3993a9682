"""Measure inside a run and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Measure in evaluation mode, without gradients and in the run's precision.

    Modes and global generators are left as they were.
    """
    training = {module: module.training for module in pl_module.modules()}
    pl_module.eval()
    try:
        with torch.no_grad(), isolate_rng(), trainer.precision_plugin.forward_context():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
