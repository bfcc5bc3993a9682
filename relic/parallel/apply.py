"""Activation checkpointing, then compilation, applied to the blocks of a network in that order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Compute", "apply_compute"]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How blocks are executed; changes no result and no parameter name.

    Args:
        checkpoint_activations: Keep only the inputs of each block and recompute the rest in the backward
            pass.
        compile_blocks: Compile each block with torch.compile; blocks of one shape share the compiled code.
    """

    checkpoint_activations: bool = False
    compile_blocks: bool = False


def apply_compute(blocks: Iterable[nn.Module], plan: Compute) -> None:
    """Apply `plan` to every block, in place."""
    for block in blocks:
        if plan.compile_blocks:
            block.compile()
        if plan.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
