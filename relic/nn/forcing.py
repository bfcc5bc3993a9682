"""A causal network in training: all blocks in one pass, each seeing what its memory would show it (paper
§4.4).

Every block reads its own keys, so that hardly anything is computed that a mask would throw away. Clean blocks
pass through the network together with the noisy ones, so that gradients reach the keys and values that a
memory would hold, and thereby the writing of memory, its pooling included. Where the past is to be a
constant, the clean ones have a pass of their own before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from relic.nn.attention import Ranges, attend_segments
from relic.nn.cells import places_of, pooled, turns_of
from relic.nn.context import KV, Context, Fresh, FreshKV, Pool, Rays, Turns
from relic.nn.memory import MeanPool, MemoryPlan
from relic.ops.masks import FORCINGS, Forcing, Packing, Segment, pack, pack_behind, pack_once
from relic.ops.pooling import cell_grid
from relic.ops.retention import block_that_ends
from relic.ops.rope import composed, grid_table, turn_heads
from relic.types import TIME_STRIDE, Controls

__all__ = ["PackedContext", "forced_velocity", "replayed_velocity"]


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


def replayed_velocity(
    net: Callable[..., tuple[Tensor, Fresh]],
    noisy: Tensor,
    *,
    clean: Tensor,
    sigma: Tensor,
    clean_sigma: Tensor,
    text: Tensor,
    controls: Controls,
    plan: MemoryPlan,
    pool: Pool = MeanPool(),  # noqa: B008 - frozen
) -> Tensor:
    """Return the velocity of the noisy latents (b, t, c, h, w), each block's behind a past that is constant.

    What a stream computes block by block with its memory, in two passes: the clean latents, without
    gradients, then all noisy blocks. It is `teacher` forcing of the last blocks, except that no gradient
    passes through the clean latents.

    net: a Denoiser or DiT.
    noisy: whole blocks at the end of the clip.
    clean: (b, t', c, h, w), what the stream committed: the image and all blocks but the last.
    sigma, clean_sigma: levels (b, t) and (b, t').
    text: one prompt for the clip.
    controls: of all frames of the clip, (b, f, ...).
    plan: policy, which must not choose by pose, grid and block length; its horizon is not used.
    pool: how tokens are pooled over cells.

    Raises:
        ValueError: If clean and noisy latents don't join to whole blocks.
    """
    size, given = plan.block_latents, clean.shape[1]
    if not noisy.shape[1]:
        raise ValueError("There are no noisy latents; give whole blocks.")
    last = 1 + block_that_ends(given, block_latents=size)
    start = given + size - noisy.shape[1]
    first = 1 + block_that_ends(start, block_latents=size)
    context = partial(PackedContext, plan=plan, pool=pool, device=noisy.device)
    with torch.no_grad():
        once = context(pack_once(plan.policy, last=last - 1, block_latents=size), fresh=True)
        steer = _frames(controls, slice(0, 1 + (given - 1) * TIME_STRIDE))
        _, past = net(clean, sigma=clean_sigma, text=text, controls=steer, memory=once)
    # older torch keeps weights as autocast cast them without gradients, and would find them here
    torch.clear_autocast_cache()
    behind = context(pack_behind(plan.policy, first=first, last=last, block_latents=size), past=past)
    steer = _frames(controls, slice(1 + (start - 1) * TIME_STRIDE, None))
    velocity, _ = net(noisy, sigma=sigma, text=text, controls=steer, memory=behind)
    return velocity


def _frames(controls: Controls, at: slice) -> Controls:
    return Controls(*(None if x is None else x[:, at] for x in controls))  # type: ignore[arg-type]


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


class _Pooled(NamedTuple):
    """Latents of a pass that are pooled by one factor: places (n,), and the table of their cells' places."""

    places: Tensor
    rope: Tensor


class PackedContext(Context):
    """Attention of a training pass: a `Context` that holds nothing but the plan of the pass, and what was
    given before it.

    Keys are laid out as [tokens given | all tokens of the pass | cells of latents, by factor and time]; each
    block sees ranges of them. Cells are of what is given, or else of the pass.

    Args:
        packing: Who sees whom.
        plan: Policy and grid.
        pool: How tokens are pooled over cells.
        device: Where the pass runs.
        fresh: Whether the pass is to return its keys and values, as a past for another.
        past: Keys and values of the latents that the packing takes as given, from such a pass.
    """

    def __init__(
        self,
        packing: Packing,
        *,
        plan: MemoryPlan,
        pool: Pool,
        device: torch.device | str,
        fresh: bool = False,
        past: Fresh = (),
    ) -> None:
        self.packing, self.plan, self.pool, self.device = packing, plan, pool, torch.device(device)
        self.fresh, self.past = fresh, past
        assert bool(past) == bool(packing.given) and not (past and fresh)
        known = past[0].k.dtype if past else torch.float64
        self.table_dtype = torch.promote_types(known, torch.float32)
        seen = sorted({pair for segment in packing.segments for pair in segment.sees if pair[1] > 1})
        self._behind: dict[tuple[int, int], tuple[int, int]] = {}
        self.pooled: dict[int, _Pooled] = {}
        end = len(packing.times) * plan.tokens_per_latent
        for factor in sorted({factor for _, factor in seen}):
            places = tuple(place for place, by in seen if by == factor)
            rope = self._table_of(places, factor)
            self.pooled[factor] = _Pooled(places_of(places, self.device), rope)
            cells = prod(cell_grid(plan.rows, plan.columns, factor=factor))
            for place in places:
                self._behind[place, factor] = end, end + cells
                end += cells
        self.turns: Turns | None = None  # of what is given
        if past:
            rope, rays = self._table_of(range(packing.given)), past[0].rays
            self.turns = Turns.of_tokens(rope if rays is None else composed(rope, rays[1]), rays)
        self.queries = tuple(len(segment.queries) * plan.tokens_per_latent for segment in packing.segments)
        self.keys = tuple(self._ranges(segment) for segment in packing.segments)

    @property
    def times(self) -> tuple[int, ...]:
        return self.packing.times[self.packing.given :]

    @property
    def factors(self) -> tuple[int, ...]:
        """Of its own cells, or of all that another pass may want of it; what is given has its own."""
        if self.past:
            return ()
        return self.plan.factors if self.fresh else tuple(self.pooled)

    def layer(self, index: int) -> PackedLayer:
        return PackedLayer(context=self, index=index, past=self.past[index] if self.past else None)

    def _table_of(self, places: Sequence[int], factor: int = 1) -> Tensor:
        """Return the rotary table (n, 2, d) of the tokens of latents, or of their cells."""
        return grid_table(
            [self.packing.times[place] for place in places], self.plan.rows, self.plan.columns,
            head_width=self.plan.head_width, factor=self.plan.rope_factor, cells=factor, device=self.device,
            dtype=self.table_dtype,
        )  # fmt: skip

    def _ranges(self, segment: Segment) -> Ranges:
        """Return the ranges of the keys that a block sees, in their order."""
        tokens = self.plan.tokens_per_latent
        places = [
            (place * tokens, (place + 1) * tokens) if factor == 1 else self._behind[place, factor]
            for place, factor in segment.sees
        ]
        ranges: list[tuple[int, int]] = []
        for start, stop in sorted(places):
            if ranges and ranges[-1][1] == start:
                ranges[-1] = ranges[-1][0], stop
            else:
                ranges.append((start, stop))
        return tuple(ranges)

    def laid_out(self, layer: int, *, source: FreshKV, turned: KV) -> KV:
        """Return all keys and values of a layer, (b, k, m, d).

        source: those, not turned, whose cells are seen, (b, k, n', d): what is given, or else what the pass
            computed.
        turned: those that the pass computed, (b, k, n, d).
        """
        kv, rays, grid = KV(source.k, source.v), source.rays, (self.plan.rows, self.plan.columns)
        latents = source.k.shape[2] // self.plan.tokens_per_latent  # of the shape: compiled for any length
        pieces = [turned]
        if self.turns is not None:
            pieces.insert(0, self.turns(kv))
        for factor, (places, rope) in self.pooled.items():
            cells = pooled(kv, places, factor=factor, layer=layer, grid=grid, pool=self.pool)
            pieces.append(turns_of(rays, places, factor=factor, of=latents, rope=rope)(cells))
        keys, values = (
            torch.cat([x.to(whole.dtype) for x in each], dim=2) if len(pieces) > 1 else whole
            for whole, each in zip(turned, zip(*pieces, strict=True), strict=True)
        )
        return KV(keys, values)


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """One layer's attention in a training pass: every block reads its own keys."""

    context: PackedContext
    index: int
    past: FreshKV | None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, rope: Tensor, rays: Rays | None = None
    ) -> tuple[Tensor, FreshKV | None]:
        turned = Turns.of_tokens(rope, rays)(KV(k, v))
        q, turned = turn_heads(q, rope).to(turned.v.dtype), KV(turned.k.to(turned.v.dtype), turned.v)
        fresh = FreshKV(k, v, rays)
        kv = self.context.laid_out(self.index, source=self.past or fresh, turned=turned)
        return self._read(q, kv), fresh if self.context.fresh else None

    @torch.compiler.disable  # who sees whom differs with the length of a clip
    def _read(self, q: Tensor, kv: KV) -> Tensor:
        return attend_segments(q, *kv, queries=self.context.queries, keys=self.context.keys)
