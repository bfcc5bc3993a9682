"""Where attention goes: how much of it a block gives to its window, to what is behind it, and to itself.

A pass of its own, slow and explicit, for pictures and studies. The network runs as ever; beside each layer's
output the probabilities are computed again, a stretch of queries at a time, and summed by group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from relic.nn.context import FreshKV, Rays
from relic.nn.denoiser import Denoiser
from relic.nn.memory import Memory, MemoryLayer
from relic.ops.rope import turn_heads
from relic.types import Block

__all__ = ["Shares", "attention_shares"]

QUERIES = 256  # at a time


class Shares(NamedTuple):
    """Attention of one pass by group, (layers,) float64 each on the CPU; in each layer they sum to 1.

    window: older latents of the window, in full. memory: what is kept behind it. own: the block itself.
    """

    window: Tensor
    memory: Tensor
    own: Tensor


@torch.no_grad()
def attention_shares(net: Denoiser, memory: Memory, block: Block, *, sigma: float, text: Tensor) -> Shares:
    """Return the shares of attention of a block, mean over queries and heads, in a pass at noise level sigma.

    memory: as it was before the block was committed; it is not changed. block: latents at `sigma`, one
    stream or several.

    Raises:
        ValueError: If the memory stands elsewhere in the stream.
    """
    if memory.block != block.index:
        raise ValueError(
            f"The memory is at block {memory.block}, the pass is of block {block.index}: keep a fork of the "
            "memory from before that block."
        )
    view = memory.view()
    counting = _Counting(times=view.times, memory=memory)
    levels = torch.full(block.latents.shape[:2], sigma, dtype=torch.float64, device=memory.device)
    net(block.latents, sigma=levels, text=text, controls=block.controls, memory=counting)
    return Shares(*torch.stack(counting.shares).unbind(1))


@dataclass(frozen=True, kw_only=True)
class _Counting:
    """A `Context` that reads a memory and notes where each layer's attention goes."""

    times: tuple[int, ...]
    memory: Memory
    factors: tuple[int, ...] = ()
    shares: list[Tensor] = field(default_factory=list)

    def layer(self, index: int) -> _CountingLayer:
        return _CountingLayer(context=self, inner=self.memory.view().layer(index))


@dataclass(frozen=True, kw_only=True)
class _CountingLayer:
    context: _Counting
    inner: MemoryLayer

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, rope: Tensor, rays: Rays | None = None
    ) -> tuple[Tensor, FreshKV | None]:
        memory = self.context.memory
        keys = self.inner.read(k, v, rope=rope, rays=rays).k
        # without a limit on the window, all that is older is in it
        window = memory.length
        if memory.plan.policy.span is not None:
            window = memory.plan.window_tokens(memory.latents)
        borders = (0, window, memory.length, keys.shape[2])
        self.context.shares.append(_by_group(turn_heads(q, rope), keys, borders=borders))
        return self.inner(q, k, v, rope=rope, rays=rays)


def _by_group(q: Tensor, keys: Tensor, *, borders: tuple[int, ...]) -> Tensor:
    """Return the mean share of attention (groups,) of keys between borders. q, keys: (b, k, n, d)."""
    totals = torch.zeros(len(borders) - 1, dtype=torch.float64)
    keys = keys.float()
    for queries in q.float().split(QUERIES, dim=2):
        probability = (queries @ keys.mT * q.shape[-1] ** -0.5).softmax(-1)
        totals += torch.stack(
            [probability[..., a:b].sum(dtype=torch.float64) for a, b in pairwise(borders)]
        ).cpu()
    return totals / (q.shape[0] * q.shape[1] * q.shape[2])
