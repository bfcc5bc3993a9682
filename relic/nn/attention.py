"""One façade for attention kernels: every caller states queries, keys and values, none names a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

__all__ = ["Ranges", "attend", "attend_segments", "preference"]

Ranges = tuple[tuple[int, int], ...]  # start and stop of each

# cuDNN is 1.7x faster than the flash kernel at Wan's shapes on Hopper, but has to plan each new shape, which
# takes long: a student's blocks all have other lengths, and small ones are soon done either way.
WORTH_A_PLAN = 2**22  # scores of a head, queries times keys
REST = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LARGE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *REST]
SMALL = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *REST]
TILE = 128  # queries, and keys, that kernels take at a time
# For heads up to 64 wide, flex attention's own choice is 1.4 times slower on Hopper.
NARROW = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}


def attend(q: Tensor, k: Tensor, v: Tensor, *, parts: int = 1) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v. q: (b, k, n, d); k, v: (b, k, m, d) -> (b, k, n, d). Nothing is masked.

    parts: equal parts of the queries (the latents, say) that may be dealt out as samples. Backward passes
    share keys out over the processors, a tile to each: a few keys would leave most of them idle.
    """
    if not _fast(q):
        return F.scaled_dot_product_attention(q, k, v)
    dealt = parts > 1 and k.shape[2] < TILE and torch.is_grad_enabled()
    if dealt:
        q = q.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)
        k, v = (x.repeat_interleave(parts, dim=0) for x in (k, v))
    with sdpa_kernel(preference(q.shape[2], k.shape[2]), set_priority=True):
        read = F.scaled_dot_product_attention(q, k, v)
    return read.unflatten(0, (-1, parts)).transpose(1, 2).flatten(2, 3) if dealt else read


def preference(queries: int, keys: int) -> list[SDPBackend]:
    """Return kernels for so many queries and keys, the best first; the order is no demand."""
    return LARGE if queries * keys >= WORTH_A_PLAN else SMALL


def attend_segments(
    q: Tensor, k: Tensor, v: Tensor, *, queries: Sequence[int], keys: Sequence[Ranges]
) -> Tensor:
    """Return what each segment of the queries reads of its own keys and values, (b, k, n, d).

    On a GPU (Ampere or later), in half precision, all segments are one call, which gathers nothing. Else each
    has its own call, for which its keys are gathered.

    q: (b, k, n, d), of which segment after segment has `queries`; k, v: (b, k, m, d), of which each sees
        `keys`, ranges that don't overlap.
    """
    if _takes_segments(q):
        # fewer queries than a tile go to a kernel with options of its own
        options: dict[str, Any] = dict(NARROW) if q.shape[-1] <= 64 and q.shape[2] >= TILE else {}
        if q.shape[2] % TILE == 0:  # whole tiles, of keys as well: no border needs to be looked at
            options["IS_DIVISIBLE"] = True
            if lacking := -k.shape[2] % TILE:
                k, v = (F.pad(x, (0, 0, 0, lacking)) for x in (k, v))
        mask = _tiles(tuple(queries), tuple(keys), k.shape[2], q.device)
        read = _compiled()(q, k, v, block_mask=mask, kernel_options=options or None)
        assert isinstance(read, Tensor)  # nothing beside it was asked for
        return read
    own = q.split(list(queries), dim=2)
    if not torch.is_grad_enabled():
        pairs = [(_taken(k, seen), _taken(v, seen)) for seen in keys]
    else:  # in one go: the backward pass of every gather fills the length of the keys
        lengths = [sum(stop - start for start, stop in seen) for seen in keys]
        chosen = tuple(piece for seen in keys for piece in seen)
        pairs = list(zip(*(_taken(x, chosen).split(lengths, dim=2) for x in (k, v)), strict=True))
    return torch.cat([attend(x, *pair) for x, pair in zip(own, pairs, strict=True)], dim=2)


def _taken(x: Tensor, ranges: Ranges) -> Tensor:
    """Return ranges of the tokens of x (b, k, n, d), which may overlap, one after another. Cheaper than
    slices, whose backward passes each fill the length of x.
    """
    return _Taken.apply(x, ranges)


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: Ranges) -> Tensor:
        ctx.ranges, ctx.size = ranges, x.shape
        return torch.cat([x[:, :, start:stop] for start, stop in ranges], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed = grad.new_zeros(ctx.size)
        pieces = grad.split([stop - start for start, stop in ctx.ranges], dim=2)
        for (start, stop), piece in zip(ctx.ranges, pieces, strict=True):
            summed[:, :, start:stop] += piece
        return summed, None


def _fast(q: Tensor) -> bool:
    """Say whether these queries are for the kernels for half precision on a GPU."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def _takes_segments(q: Tensor) -> bool:
    """Say whether the kernel that takes segments, which has no other to fall back to, takes these queries."""
    if not _fast(q) or q.shape[-1] not in (16, 32, 64, 128, 256):
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


@cache
def _compiled() -> Callable[..., Tensor]:
    """Return the kernel that takes segments: compiled at first use, for any lengths from the second on.

    Without compilation it would hold all scores, so that a failure to compile is an error.
    """
    return torch.compile(flex_attention, fullgraph=True)


@cache  # for good: it comes from the host, and what was recorded reads it where it is
def _tiles(queries: tuple[int, ...], keys: tuple[Ranges, ...], count: int, device: torch.device) -> BlockMask:
    """Return who sees whom of `count` keys, tile by tile: where no one sees anyone nothing is computed, and
    where all see all nothing is masked.
    """
    with torch.inference_mode(False), torch.no_grad():  # it may be first wanted by a sample, then by a fit
        sees = torch.zeros(len(queries), -(-count // TILE) * TILE, dtype=torch.bool, device="cpu")
        for row, ranges in zip(sees, keys, strict=True):
            for start, stop in ranges:
                row[start:stop] = True
        segments = torch.arange(len(queries), device="cpu")
        segment_of = segments.repeat_interleave(torch.tensor(queries, device="cpu"))
        seen = sees.unflatten(1, (-1, TILE)).sum(-1)  # keys of each tile, by segment
        some, whole = [], []
        for tile in segment_of.split(TILE):
            own = seen[tile[0] : tile[-1] + 1]
            whole.append((own == TILE).all(0) & (len(tile) == TILE))
            some.append((own > 0).any(0) & ~whole[-1])
        listed = [_listed(torch.stack(each).to(device)) for each in (some, whole)]
        sees, segment_of = sees[:, :count].to(device), segment_of.to(device)

        def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees[segment_of[query], key]

        return BlockMask.from_kv_blocks(
            *listed[0], *listed[1], BLOCK_SIZE=TILE, mask_mod=mask, seq_lengths=(len(segment_of), count)
        )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tiles of each row are set, (1, 1, rows), and the numbers of all, those first, (1, 1,
    rows, columns), int32.
    """
    order = tiles.int().argsort(dim=1, descending=True, stable=True).int()
    return tiles.sum(1, dtype=torch.int32)[None, None], order[None, None]
