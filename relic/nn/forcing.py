"""A causal network in training: all blocks in one pass, each seeing what its memory would show it (paper
§4.4).

Every block reads its own keys, so that hardly anything is computed that a mask would throw away. Clean blocks
pass through the network together with the noisy ones, so that gradients reach the keys and values that a
memory would hold, and thereby the writing of memory, its pooling included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from relic.nn.attention import Ranges, attend_segments
from relic.nn.cells import places_of, pooled, turns_of
from relic.nn.context import KV, Context, Fresh, Pool, Rays, Turns
from relic.nn.memory import MeanPool, MemoryPlan
from relic.ops.masks import FORCINGS, Forcing, Packing, Segment, pack
from relic.ops.pooling import cell_grid
from relic.ops.retention import block_that_ends
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


class _Pooled(NamedTuple):
    """Latents of a pass that are pooled by one factor: places (n,), and the table of their cells' places."""

    places: Tensor
    rope: Tensor


class PackedContext(Context):
    """Attention of a training pass: a `Context` that holds nothing but the plan of the pass.

    Keys are laid out as [all tokens of the pass | cells of latents, by factor and time]; each block sees
    ranges of them.

    Args:
        packing: Who sees whom.
        plan: Policy and grid.
        pool: How tokens are pooled over cells.
        device: Where the pass runs.
    """

    def __init__(self, packing: Packing, *, plan: MemoryPlan, pool: Pool, device: torch.device | str) -> None:
        self.packing, self.plan, self.pool = packing, plan, pool
        seen = sorted({pair for segment in packing.segments for pair in segment.sees if pair[1] > 1})
        self._behind: dict[tuple[int, int], tuple[int, int]] = {}
        self.pooled: dict[int, _Pooled] = {}
        end = len(packing.times) * plan.tokens_per_latent
        for factor in sorted({factor for _, factor in seen}):
            places = tuple(place for place, by in seen if by == factor)
            rope = grid_table(
                [packing.times[place] for place in places], plan.rows, plan.columns,
                head_width=plan.head_width, factor=plan.rope_factor, cells=factor, device=device,
            )  # fmt: skip
            self.pooled[factor] = _Pooled(places_of(places, torch.device(device)), rope)
            cells = prod(cell_grid(plan.rows, plan.columns, factor=factor))
            for place in places:
                self._behind[place, factor] = end, end + cells
                end += cells
        self.queries = tuple(len(segment.queries) * plan.tokens_per_latent for segment in packing.segments)
        self.keys = tuple(self._ranges(segment) for segment in packing.segments)

    @property
    def times(self) -> tuple[int, ...]:
        return self.packing.times

    @property
    def factors(self) -> tuple[int, ...]:
        return tuple(self.pooled)

    def layer(self, index: int) -> PackedLayer:
        return PackedLayer(context=self, index=index)

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

    def laid_out(self, layer: int, *, fresh: KV, turned: KV, rays: Rays | None) -> KV:
        """Return all keys and values of a layer, (b, k, m, d), of those that the pass computed, (b, k, n, d),
        before and after they were turned.
        """
        grid, pieces = (self.plan.rows, self.plan.columns), [turned]
        latents = turned.k.shape[2] // self.plan.tokens_per_latent  # of the shape: compiled for any length
        for factor, (places, rope) in self.pooled.items():
            cells = pooled(fresh, places, factor=factor, layer=layer, grid=grid, pool=self.pool)
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

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, rope: Tensor, rays: Rays | None = None
    ) -> tuple[Tensor, None]:
        turned = Turns.of_tokens(rope, rays)(KV(k, v))
        q, turned = turn_heads(q, rope).to(turned.v.dtype), KV(turned.k.to(turned.v.dtype), turned.v)
        kv = self.context.laid_out(self.index, fresh=KV(k, v), turned=turned, rays=rays)
        return self._read(q, kv), None

    @torch.compiler.disable  # who sees whom differs with the length of a clip
    def _read(self, q: Tensor, kv: KV) -> Tensor:
        return attend_segments(q, *kv, queries=self.context.queries, keys=self.context.keys)
