"""A causal network in training: all blocks in one pass, each seeing what its memory would show it (paper
§4.4).

No mask: every block has one attention call over its own concatenated keys, so that nothing is computed that a
mask would throw away. Clean blocks pass through the network together with the noisy ones, so that
gradients reach the keys and values that a memory would hold, and thereby the writing of memory, its pooling
included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relic.nn.attention import attend
from relic.nn.cells import pooled, turns_of
from relic.nn.context import KV, Context, Fresh, Pool, Rays, Turns
from relic.nn.memory import MeanPool, MemoryPlan
from relic.ops.masks import FORCINGS, Forcing, Packing, Segment, pack
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


class PackedContext(Context):
    """Attention of a training pass: a `Context` that holds nothing but the plan of the pass.

    Args:
        packing: Who sees whom.
        plan: Policy and grid.
        pool: How tokens are pooled over cells.
        device: Where the pass runs.
    """

    def __init__(self, packing: Packing, *, plan: MemoryPlan, pool: Pool, device: torch.device | str) -> None:
        self.packing, self.plan, self.pool = packing, plan, pool
        seen = {pair for segment in packing.segments for pair in segment.sees}
        factors = sorted({factor for _, factor in seen} - {1})
        self.pooled = {f: sorted(place for place, factor in seen if factor == f) for f in factors}
        self._tables = {}
        for factor, places in self.pooled.items():
            times = [packing.times[place] for place in places]
            self._tables[factor] = grid_table(
                times, plan.rows, plan.columns, head_width=plan.head_width, factor=plan.rope_factor,
                cells=factor, device=device,
            )  # fmt: skip

    @property
    def times(self) -> tuple[int, ...]:
        return self.packing.times

    @property
    def factors(self) -> tuple[int, ...]:
        return tuple(self.pooled)

    def layer(self, index: int) -> PackedLayer:
        return PackedLayer(context=self, index=index)

    def _pool(self, layer: int, kv: KV, rays: Rays | None) -> dict[int, KV]:
        """Return for each factor the pooled, rotated keys and the values of all latents that some block sees
        so, (b, k, n, d) in the order of `pooled`.
        """
        forms, grid = {}, (self.plan.rows, self.plan.columns)
        for factor, places in self.pooled.items():
            cells = pooled(kv, places, factor=factor, layer=layer, grid=grid, pool=self.pool)
            rope, of = self._tables[factor], len(self.times)
            forms[factor] = turns_of(rays, places, factor=factor, of=of, rope=rope)(cells)
        return forms

    def _seen(self, segment: Segment, full: Sequence[KV], forms: dict[int, KV]) -> KV:
        """Return the keys and values that a block attends to. full: those of each latent of the pass."""
        pieces = [full[place] for place, factor in segment.sees if factor == 1]
        for factor, places in self.pooled.items():
            seen = sum(f == factor for _, f in segment.sees)
            # the window only moves on: what a block sees pooled are the first of what the last one does
            if seen:
                cells = forms[factor].k.shape[2] // len(places)
                pieces.append(KV(*(x[:, :, : seen * cells] for x in forms[factor])))
        return KV(*(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True)))


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """One layer's attention in a training pass: a call for every block."""

    context: PackedContext
    index: int

    @torch.compiler.disable  # clips differ in their blocks; what is round it is compiled once
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, rope: Tensor, rays: Rays | None = None
    ) -> tuple[Tensor, None]:
        context, tokens = self.context, self.context.plan.tokens_per_latent
        forms = context._pool(self.index, KV(k, v), rays)
        k, v = Turns.of_tokens(rope, rays)(KV(k, v))
        q, k = turn_heads(q, rope).to(v.dtype), k.to(v.dtype)
        # split, not sliced: the backward pass of every slice would fill the length of the whole pass
        segments = context.packing.segments
        queries = q.split([len(segment.queries) * tokens for segment in segments], dim=2)
        full = [KV(*latent) for latent in zip(k.split(tokens, dim=2), v.split(tokens, dim=2), strict=True)]
        read = []
        for segment, own in zip(segments, queries, strict=True):
            keys, values = context._seen(segment, full, forms)
            read.append(attend(own, keys.to(v.dtype), values))
        return torch.cat(read, dim=2), None
