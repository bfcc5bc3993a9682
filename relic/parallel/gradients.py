"""Gradients of a stage that runs its own backward passes: averaged over ranks, then clipped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["average_gradients", "clip_gradients"]

BUCKET = 2**26  # bytes sent at once: few messages, little memory


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all ranks, in place; those of sharded parameters have been already (FSDP2).

    Every rank has to call it, and a parameter must have a gradient on all ranks or on none.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for bucket in _buckets(whole):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], *, limit: float | None) -> Tensor:
    """Scale gradients so that the norm of all of them together is at most `limit`; return what it was."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
