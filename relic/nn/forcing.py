"""A causal network in training: all blocks in one pass, each seeing what its memory would show it (paper
§4.4).

No mask: every block reads its own concatenated keys, so that nothing is computed that a mask would throw
away. Clean blocks pass through the network together with the noisy ones, so that
gradients reach the keys and values that a memory would hold, and thereby the writing of memory, its pooling
included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from relic.nn.attention import Ranges, attend_segments, taken
from relic.nn.cells import pooled, turns_of
from relic.nn.context import KV, Context, Fresh, Pool, Rays, Turns
from relic.nn.memory import MeanPool, MemoryPlan
from relic.ops.masks import FORCINGS, Forcing, Packing, Segment, pack
from relic.ops.pooling import cell_grid
from relic.ops.retention import block_that_ends, window_start
from relic.ops.rope import grid_table, turn_heads
from relic.types import TIME_STRIDE, Controls

__all__ = ["PackedContext", "forced_velocity"]


def forced_velocity(
    net: Callable[..., tuple[Tensor, Fresh]],
    noisy: Tensor,
    *,
    clean: Tensor,
    sigma: Tensor,
    clean_sigma: Tensor | None = None,
    text: Tensor,
    controls: Controls | None,
    plan: MemoryPlan,
    forcing: Forcing,
    pool: Pool = MeanPool(),  # noqa: B008 - frozen
) -> Tensor:
    """Return the velocity of the noisy latents (b, t, c, h, w), with gradients through the clean ones.

    net: a Denoiser or DiT.
    noisy: whole blocks at the end of the clip.
    clean: (b, t', c, h, w), what generation would have cached, from the image on. `hybrid`: the blocks before
        the noisy ones. `diffusion`: the image. `teacher`: the image and all blocks but the last; `noisy` are
        then all blocks.
    sigma: (b, t) levels of the noisy latents, one a block.
    clean_sigma: (b, t') levels of the clean latents, 0 for the image; None is 0 for all.
    text: one prompt for the clip.
    controls: of all frames of the clip, the last block's included.
    plan: policy, grid and block length; its horizon is not used.

    Raises:
        ValueError: If clean and noisy latents don't join to whole blocks as `forcing` has it.
    """
    blocks = _blocks(forcing, clean=clean.shape[1], noisy=noisy.shape[1], block_latents=plan.block_latents)
    packing = pack(forcing, plan.policy, blocks=blocks, block_latents=plan.block_latents)
    if clean_sigma is None:
        clean_sigma = sigma.new_zeros(clean.shape[:2])
    if controls is not None and forcing == "teacher":
        controls = Controls(*(None if x is None else _twice(x, clean=clean.shape[1]) for x in controls))  # type: ignore[arg-type]
    velocity, _ = net(
        torch.cat([clean, noisy], dim=1),
        sigma=torch.cat([clean_sigma, sigma], dim=1),
        text=text,
        controls=controls,
        memory=PackedContext(packing, plan=plan, pool=pool, device=noisy.device),
    )
    return velocity[:, clean.shape[1] :]


def _blocks(forcing: Forcing, *, clean: int, noisy: int, block_latents: int) -> int:
    if forcing not in FORCINGS:
        raise ValueError(f"forcing={forcing!r} must be one of {', '.join(FORCINGS)}.")
    total = 1 + noisy if forcing == "teacher" else clean + noisy
    blocks, known = (block_that_ends(n, block_latents=block_latents) for n in (total, clean))
    wanted = {"teacher": (blocks - 1,), "diffusion": (0,), "hybrid": tuple(range(blocks))}[forcing]
    if known not in wanted or noisy == 0:
        raise ValueError(
            f"forcing={forcing!r} with {noisy} noisy latents can't take {clean} clean ones; give the image "
            f"and {wanted[0] * block_latents} more."
        )
    return blocks


def _twice(frames: Tensor, *, clean: int) -> Tensor:
    """Pack controls (b, f, c) as [clean | noisy]: frames of the clean latents, then all after the first."""
    return torch.cat([frames[:, : 1 + (clean - 1) * TIME_STRIDE], frames[:, 1:]], dim=1)


class PackedContext(Context):
    """Attention of a training pass: a `Context` that holds nothing but the plan of the pass.

    Keys are laid out as [all tokens of the pass | past]: latents as they are seen from behind the window, in
    order of time. The window only moves on, so what a block sees of the past is its beginning.

    Args:
        packing: Who sees whom.
        plan: Policy and grid.
        pool: How tokens are pooled over cells.
        device: Where the pass runs.
    """

    def __init__(self, packing: Packing, *, plan: MemoryPlan, pool: Pool, device: torch.device | str) -> None:
        self.packing, self.plan, self.pool = packing, plan, pool
        past = {pair for segment in packing.segments for pair in self._past(segment)}
        self.past = sorted(past)
        factors = sorted({factor for _, factor in past} - {1})
        self.pooled = {f: [place for place, factor in self.past if factor == f] for f in factors}
        self._tables = {}
        for factor, places in self.pooled.items():
            times = [packing.times[place] for place in places]
            self._tables[factor] = grid_table(
                times, plan.rows, plan.columns, head_width=plan.head_width, factor=plan.rope_factor,
                cells=factor, device=device,
            )  # fmt: skip
        tokens = plan.tokens_per_latent
        self.queries = [len(segment.queries) * tokens for segment in packing.segments]
        sizes = [prod(cell_grid(plan.rows, plan.columns, factor=factor)) for _, factor in self.past]
        ends = list(accumulate(sizes, initial=len(packing.times) * tokens))
        self._behind = dict(zip(self.past, pairwise(ends), strict=True))
        self.keys = [self._ranges(segment) for segment in packing.segments]

    @property
    def times(self) -> tuple[int, ...]:
        return self.packing.times

    @property
    def factors(self) -> tuple[int, ...]:
        return tuple(self.pooled)

    def layer(self, index: int) -> PackedLayer:
        return PackedLayer(context=self, index=index)

    def _past(self, segment: Segment) -> tuple[tuple[int, int], ...]:
        """Return the latents that a block sees from behind its window, and by which factor."""
        start = window_start(self.plan.policy, segment.block, block_latents=self.plan.block_latents)
        return tuple(pair for pair in segment.sees if self.packing.times[pair[0]] < start)

    def _ranges(self, segment: Segment) -> Ranges:
        """Return the ranges of the keys that a block sees."""
        tokens, past = self.plan.tokens_per_latent, self._past(segment)
        window = [place for place, _ in segment.sees[len(past) :]]
        places = [self._behind[pair] for pair in past] + [(p * tokens, (p + 1) * tokens) for p in window]
        ranges: list[tuple[int, int]] = []
        for start, stop in places:
            if ranges and ranges[-1][1] == start:
                ranges[-1] = ranges[-1][0], stop
            else:
                ranges.append((start, stop))
        return tuple(ranges)

    def laid_out(self, layer: int, *, fresh: KV, turned: KV, rays: Rays | None) -> KV:
        """Return all keys and values of a layer (m, z, d), tokens first, of those that the pass computed, (b,
        k, n, d), before and after they were turned.
        """
        tokens, grid = self.plan.tokens_per_latent, (self.plan.rows, self.plan.columns)
        full, pieces = KV(*map(_tokens_first, turned)), {}
        for factor, places in self.pooled.items():
            cells = pooled(fresh, places, factor=factor, layer=layer, grid=grid, pool=self.pool)
            turn = turns_of(rays, places, factor=factor, of=len(self.times), rope=self._tables[factor])
            pieces[factor] = [_tokens_first(x).tensor_split(len(places)) for x in turn(cells)]
        if kept := tuple((p * tokens, (p + 1) * tokens) for p, factor in self.past if factor == 1):
            pieces[1] = [taken(x, kept).split(tokens) for x in full]
        both = []
        for number, x in enumerate(full):
            rest = {factor: iter(each[number]) for factor, each in pieces.items()}
            both.append(torch.cat([x, *(next(rest[factor]).to(x.dtype) for _, factor in self.past)]))
        return KV(*both)


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """One layer's attention in a training pass: every block reads its own keys."""

    context: PackedContext
    index: int

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, rope: Tensor, rays: Rays | None = None
    ) -> tuple[Tensor, None]:
        turned = Turns.of_tokens(rope, rays)(KV(k, v))
        q, turned = turn_heads(q, rope).to(turned.v.dtype), KV(turned.k.to(turned.v.dtype), turned.v)
        return self._read(q, fresh=KV(k, v), turned=turned, rays=rays), None

    @torch.compiler.disable  # clips differ in their blocks; what is round it is compiled once
    def _read(self, q: Tensor, *, fresh: KV, turned: KV, rays: Rays | None) -> Tensor:
        k, v = self.context.laid_out(self.index, fresh=fresh, turned=turned, rays=rays)
        queries, keys = self.context.queries, self.context.keys
        read = attend_segments(_tokens_first(q), k, v, queries=queries, keys=keys)
        return rearrange(read, "n (b k) d -> b k n d", b=len(q))


def _tokens_first(x: Tensor) -> Tensor:
    return rearrange(x, "b k n d -> n (b k) d")
