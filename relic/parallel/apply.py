"""How a network's blocks are executed: activation checkpointing, then compilation, applied from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["Compute", "HasBlocks", "apply_compute"]

ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    for kernel in (
        "cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu"
    )
    if hasattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
)  # fmt: skip


class HasBlocks(Protocol):
    """A network that `apply_compute` can work on."""

    blocks: nn.ModuleList
    residual: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How blocks are executed; changes no parameter name.

    Args:
        checkpointing: What the forward pass keeps for the backward pass: `none` keeps everything; `selective`
            keeps the input of each block, what attention returns and the products that are no wider than
            their input, and computes the rest again; `full` keeps the inputs only.
        compile_blocks: Compile each block with torch.compile; blocks of one shape share the compiled code.
        residual: Dtype of the residual stream: `float32`, as the public weights were trained, or `bfloat16`,
            which is faster and rounds more.
    """

    checkpointing: Literal["none", "selective", "full"] = "none"
    compile_blocks: bool = False
    residual: Literal["float32", "bfloat16"] = "float32"


def apply_compute(net: HasBlocks, plan: Compute) -> None:
    """Apply `plan` to a network and its blocks, in place."""
    net.residual = getattr(torch, plan.residual)
    for block in net.blocks:
        if plan.checkpointing != "none":
            block.forward = checkpointed(block.forward, selective=plan.checkpointing == "selective")
        if plan.compile_blocks:
            block.forward = torch.compile(block.forward)


def checkpointed(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    """Return `forward` with activation checkpointing round it."""
    kept: dict[str, Any] = {"context_fn": keep_what_is_dear} if selective else {}

    def run(*args: Any, **kwargs: Any) -> Any:  # the compiler enters a function, but skips a partial
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kept, **kwargs)

    return run


def keep_what_is_dear() -> Any:
    """Return the contexts of selective checkpointing."""
    return create_selective_checkpoint_contexts(_choose)


def _choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep attention, quadratic in length, and products that are no wider than what they are made of."""
    if op in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        matrix = args[-1]  # (in, out)
        if matrix.shape[1] <= matrix.shape[0]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
