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


Keep = Literal["all", "products", "attention", "inputs"]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How blocks are executed; changes no parameter name.

    Args:
        keep: What the forward pass keeps for the backward pass, the rest is computed again: `all`;
            `products`, which are block inputs, what attention returns and matrix products no wider than their
            input; `attention`, block inputs and what self-attention returns; or `inputs`, block inputs only.
            The two in the middle are called selective activation checkpointing, the last full checkpointing.
            In half precision on a GPU, self-attention over many blocks at once (`CausalInit`, `SelfForcing`
            with `replay_by: clip`) is computed again in all three.
        compile_blocks: Compile each block with torch.compile; blocks of one shape share the compiled code.
            Raises torch's limit of recompilations for the whole process.
        residual: Dtype of the residual stream: `float32`, as the public weights were trained, or `bfloat16`,
            which is faster and rounds more.
        gather: Dtype in which sharded weights are gathered (`ShardedStrategy`); `bfloat16` halves what is
            sent.
    """

    keep: Keep = "all"
    compile_blocks: bool = False
    residual: Literal["float32", "bfloat16"] = "float32"
    gather: Literal["float32", "bfloat16"] = "float32"


def apply_compute(net: HasBlocks, plan: Compute) -> None:
    """Apply `plan` to a network and its blocks, in place."""
    net.residual = getattr(torch, plan.residual)
    if plan.compile_blocks:
        # a student's blocks are traced with a memory and without, with gradients and without, and for clips
        # of any length, which is more than torch allows by default; the limit is the whole process's
        torch._dynamo.config.recompile_limit = max(16, torch._dynamo.config.recompile_limit)
    for block in net.blocks:
        if plan.keep != "all":
            block.forward = checkpointed(block.forward, keep=plan.keep)
        if plan.compile_blocks:
            block.forward = torch.compile(block.forward)


def checkpointed(forward: Callable[..., Any], *, keep: Keep) -> Callable[..., Any]:
    """Return `forward` with activation checkpointing round it."""
    chosen: dict[str, Any] = {} if keep == "inputs" else {"context_fn": CONTEXTS[keep]}

    def run(*args: Any, **kwargs: Any) -> Any:  # the compiler enters a function, but skips a partial
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **chosen, **kwargs)

    return run


def keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_attention)


def keep_products() -> Any:
    return create_selective_checkpoint_contexts(_products)


CONTEXTS = {"attention": keep_attention, "products": keep_products}


def _attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what self-attention returns: it costs the square of the length to compute again."""
    if op in ATTENTION:
        queries, keys = args[:2]  # (b, k, n, d)
        if keys.shape[2] >= queries.shape[2]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep all attention, and products but for those that widen: the largest, and no dearer by the byte."""
    if op in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        matrix = args[-1]  # (in, out)
        if matrix.shape[1] <= matrix.shape[0]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
