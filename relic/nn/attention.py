"""One façade for attention kernels: every caller states queries, keys and values, none names a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

__all__ = ["Ranges", "attend", "attend_segments", "preference", "taken"]

Ranges = tuple[tuple[int, int], ...]  # start and stop of each

# cuDNN is 1.7x faster than the flash kernel at Wan's shapes on Hopper, but has to plan each new shape, which
# takes long: a student's blocks all have other lengths, and small ones are soon done either way.
WORTH_A_PLAN = 2**22  # scores of a head, queries times keys
REST = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LARGE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *REST]
SMALL = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *REST]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v. q: (b, k, n, d); k, v: (b, k, m, d) -> (b, k, n, d). Nothing is masked."""
    if _fast(q):
        with sdpa_kernel(preference(q.shape[2], k.shape[2]), set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def preference(queries: int, keys: int) -> list[SDPBackend]:
    """Return kernels for so many queries and keys, the best first; the order is no demand."""
    return LARGE if queries * keys >= WORTH_A_PLAN else SMALL


def attend_segments(
    q: Tensor, k: Tensor, v: Tensor, *, queries: Sequence[int], keys: Sequence[Ranges]
) -> Tensor:
    """Return what each segment of the queries reads of its own keys and values, (n, z, d).

    On a GPU, in half precision, all segments are one call; without gradients each has its own, so that only
    its keys are gathered at a time.

    q: (n, z, d), of which segment after segment has `queries`; k, v: (m, z, d), of which each sees `keys`.
        Tokens come first, so that a range is one piece of memory; z are the heads of all samples.
    """
    if not torch.is_grad_enabled():
        own = q.split(list(queries))
        return torch.cat(
            [_read(x, taken(k, seen), taken(v, seen)) for x, seen in zip(own, keys, strict=True)]
        )
    chosen = tuple(piece for seen in keys for piece in seen)
    k, v = taken(k, chosen), taken(v, chosen)
    lengths = tuple(sum(stop - start for start, stop in seen) for seen in keys)
    if _takes_segments(q):
        of_q, of_k = (_ends(tuple(counts), q.device) for counts in (queries, lengths))
        whole = varlen_attn(q.contiguous(), k, v, of_q, of_k, max(queries), max(lengths))
        assert isinstance(whole, Tensor)  # nothing beside it was asked for
        return whole
    pieces = (x.split(sizes) for x, sizes in ((q, list(queries)), (k, list(lengths)), (v, list(lengths))))
    return torch.cat([_read(*each) for each in zip(*pieces, strict=True)])


def _read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what queries (n, z, d) read of keys and values (m, z, d)."""
    return attend(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)


def taken(x: Tensor, ranges: Ranges, *, dim: int = 0) -> Tensor:
    """Return ranges of x along a dimension, which may overlap, one after another. Cheaper than slices, whose
    backward passes each fill the length of x.
    """
    return _Taken.apply(x, ranges, dim)


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: Ranges, dim: int) -> Tensor:
        ctx.ranges, ctx.dim, ctx.size = ranges, dim, x.shape
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in ranges], dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        summed = grad.new_zeros(ctx.size)
        pieces = grad.split([stop - start for start, stop in ctx.ranges], ctx.dim)
        for (start, stop), piece in zip(ctx.ranges, pieces, strict=True):
            summed.narrow(ctx.dim, start, stop - start).add_(piece)
        return summed, None, None


def _fast(q: Tensor) -> bool:
    """Say whether these queries are for the kernels for half precision on a GPU."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def _takes_segments(q: Tensor) -> bool:
    """Say whether the kernel that takes segments, which has no other to fall back to, takes these queries."""
    if not _fast(q) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


@cache  # they come from the host, which a recorded pass can't wait for
def _ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return 0 and where each of some segments ends, int32."""
    with torch.inference_mode(False), torch.no_grad():  # they may be first wanted by a sample, then by a fit
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
