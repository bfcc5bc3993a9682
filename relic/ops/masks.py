"""Who sees whom, when a whole clip passes through a network at once.

Keys are [full | pooled]: all tokens of the pass, then the cells of every latent that the policy pools.
Queries are the tokens of the pass, which teacher forcing packs as [clean | noisy]; or of a pass behind
latents that are given, whose keys come first. Masks are the oracle that cached and blockwise attention are
tested against; they cost the square of the clip, and nothing computes with them.
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
    "pack_behind",
    "pack_once",
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
    """A pass over blocks.

    times: index in the clip of each latent; segments: in order of queries; given: how many latents, the
    first ones, are not in the pass, since their keys and values are there already: they have no queries, but
    places as if they were in it.
    """

    times: tuple[int, ...]
    segments: tuple[Segment, ...]
    given: int = 0


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
    if forcing != "teacher":
        return pack_once(policy, last=blocks, block_latents=block_latents)
    clean = pack_once(policy, last=blocks - 1, block_latents=block_latents)
    noisy = pack_behind(policy, first=1, last=blocks, block_latents=block_latents)
    return Packing(times=noisy.times, segments=clean.segments + noisy.segments)


def pack_once(policy: Policy, *, last: int, block_latents: int) -> Packing:
    """Lay out the image and the blocks to `last`, each once, as a stream computes them."""
    check_policy(policy, block_latents=block_latents)
    segments = [_segment(policy, block, block_latents=block_latents) for block in range(last + 1)]
    return Packing(times=tuple(range(segments[-1].queries.stop)), segments=tuple(segments))


def pack_behind(policy: Policy, *, first: int, last: int, block_latents: int) -> Packing:
    """Lay out the blocks from `first` to `last`, each behind the past that a stream would have had.

    All latents before block `last` are given; the blocks of the pass see them and themselves, not each other.
    """
    check_policy(policy, block_latents=block_latents)
    given = block_range(last, block_latents=block_latents).start
    start = block_range(first, block_latents=block_latents).start
    segments = [
        _segment(policy, block, block_latents=block_latents, shift=given - start)
        for block in range(first, last + 1)
    ]
    stop = segments[-1].queries.stop - given + start
    return Packing(times=(*range(given), *range(start, stop)), segments=tuple(segments), given=given)


def _segment(policy: Policy, block: int, *, block_latents: int, shift: int = 0) -> Segment:
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
