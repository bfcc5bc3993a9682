"""Who sees whom, when a whole clip passes through a network at once.

Keys are [full | pooled]: all tokens of the pass, then the cells of every latent that the policy pools.
Queries are the tokens of the pass, which teacher forcing packs as [clean | noisy]. Masks are the oracle that
cached and blockwise attention are tested against; they cost the square of the clip, and nothing computes with
them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from relic.ops.pooling import cell_grid
from relic.ops.retention import Full, Policy, block_range, check_policy, factors_seen

__all__ = [
    "FORCINGS",
    "Forcing",
    "Packing",
    "Segment",
    "block_causal_mask",
    "forcing_mask",
    "memory_mask",
    "pack",
]

Forcing = Literal["teacher", "diffusion", "hybrid"]
FORCINGS: tuple[Forcing, ...] = ("teacher", "diffusion", "hybrid")


class Segment(NamedTuple):
    """One block of a pass: `queries`, the latents it holds, and the latents they see, as places in the pass.

    sees: (latent, factor) pairs, 1 for in full; its own latents are among them.
    """

    block: int
    queries: range
    sees: tuple[tuple[int, int], ...]


class Packing(NamedTuple):
    """A pass over blocks. times: index in the clip of each latent; segments: in order of queries."""

    times: tuple[int, ...]
    segments: tuple[Segment, ...]


def pack(forcing: Forcing, policy: Policy, *, blocks: int, block_latents: int) -> Packing:
    """Lay out the image and `blocks` blocks for one pass.

    `diffusion` and `hybrid` hold each latent once, noisy or clean: what is cached is what was computed (paper
    §4.4). `teacher` holds [clean | noisy]: the clip without its last block, which no one would see, and then
    each block again; noisy blocks see clean ones before them and themselves.
    """
    if blocks < 1:
        raise ValueError(f"blocks={blocks}: a pass needs at least one block after the image.")
    if forcing not in FORCINGS:
        raise ValueError(f"forcing={forcing!r} must be one of {', '.join(FORCINGS)}.")
    check_policy(policy, block_latents=block_latents)
    copied = blocks - 1 if forcing == "teacher" else blocks
    segments = [_segment(policy, block, block_latents=block_latents, shift=0) for block in range(copied + 1)]
    times = list(range(segments[-1].queries.stop))
    if forcing == "teacher":
        shift = len(times) - 1  # latent 1 comes again right after the clean ones
        segments += [
            _segment(policy, block, block_latents=block_latents, shift=shift)
            for block in range(1, blocks + 1)
        ]
        times += range(1, segments[-1].queries.stop - shift)
    return Packing(times=tuple(times), segments=tuple(segments))


def _segment(policy: Policy, block: int, *, block_latents: int, shift: int) -> Segment:
    own = block_range(block, block_latents=block_latents)
    factors = factors_seen(policy, block, block_latents=block_latents)
    sees = [(i + shift if i in own else i, factor) for i, factor in enumerate(factors) if factor]
    return Segment(block=block, queries=range(own.start + shift, own.stop + shift), sees=tuple(sees))


def forcing_mask(
    forcing: Forcing, policy: Policy, *, blocks: int, block_latents: int, rows: int, columns: int
) -> Tensor:
    """Return who sees whom in a training pass, bool (queries, keys), keys [full | pooled]."""
    packing = pack(forcing, policy, blocks=blocks, block_latents=block_latents)
    tokens = rows * columns
    cells = [1] * len(packing.times)
    for place, time in enumerate(packing.times):
        factor = policy.factor(time)
        high, wide = cell_grid(rows, columns, factor=factor) if factor > 1 else (0, 0)
        cells[place] = high * wide
    offsets = [len(cells) * tokens + sum(cells[:place]) for place in range(len(cells))]
    mask = torch.zeros(len(cells) * tokens, len(cells) * tokens + sum(cells), dtype=torch.bool)
    for segment in packing.segments:
        queries = slice(segment.queries.start * tokens, segment.queries.stop * tokens)
        for place, factor in segment.sees:
            start, count = (place * tokens, tokens) if factor == 1 else (offsets[place], cells[place])
            mask[queries, start : start + count] = True
    return mask


def memory_mask(policy: Policy, *, blocks: int, block_latents: int, rows: int, columns: int) -> Tensor:
    """Return what a stream of the image and `blocks` blocks sees of itself through its memory."""
    return forcing_mask(
        "diffusion", policy, blocks=blocks, block_latents=block_latents, rows=rows, columns=columns
    )


def block_causal_mask(*, blocks: int, block_latents: int, tokens: int) -> Tensor:
    """Return the mask in which every block sees itself and all before it, bool (queries, keys)."""
    return memory_mask(Full(), blocks=blocks, block_latents=block_latents, rows=1, columns=tokens)
