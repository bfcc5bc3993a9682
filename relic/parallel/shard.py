"""Fully sharded data parallelism (FSDP2), applied from outside after checkpointing and compilation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from relic.parallel.apply import Compute

__all__ = ["gathered_state", "shard_network"]


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


def gathered_state(net: nn.Module) -> dict[str, Any]:
    """Return the whole state of a network on the CPU: on rank 0, and empty on the others if it is sharded.

    Every rank has to call it.
    """
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
