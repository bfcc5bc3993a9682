"""Fully sharded data parallelism (FSDP2), applied from outside after checkpointing and compilation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from relic.parallel.apply import Compute

__all__ = ["gathered", "shard_network"]


def shard_network(net: nn.Module, blocks: Iterable[nn.Module], *, mesh: DeviceMesh, plan: Compute) -> None:
    """Shard a network over the ranks of a one-dimensional mesh, in place; a block is gathered when it runs.

    Weights stay in their own dtype; `plan.gather` is the dtype they are gathered in. Gradients are summed in
    float32. Inputs keep their dtype: rotary tables and noise levels must not be rounded.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, plan.gather), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # by default the root stays gathered after a forward pass, and one without a backward never lets go of it
    fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def gathered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights whole on the CPU; of sharded ones, on rank 0 only. Every rank has to call it."""
    keeps = not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, value in weights.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if keeps:
            whole[name] = full.detach().cpu()
    return whole
