"""The memory of a stream: keys and values of what was generated, kept as a policy says (paper §4.2).

Storage knows slots, the policy (`relic.ops.retention`) says what goes into them. Valid keys are a contiguous
prefix of one buffer: first the window, a ring of latents, then slots of what is older. The block at work is
written right behind them, so that attention reads one slice and nothing old is copied; that tail is scratch.
Pooled forms are computed when a block is committed and wait in a small staging buffer until it leaves the
window.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from relic.nn.attention import attend
from relic.nn.cells import places_of, pooled, turns_of
from relic.nn.context import KV, Fresh, FreshKV, Pool, Rays, Turns
from relic.nn.memory_plan import MemoryPlan
from relic.ops.covisibility import redundancy
from relic.ops.pooling import cell_positions, pool_cells
from relic.ops.retention import Compressed, Full, Policy, SinkWindow, Window, admit
from relic.ops.rope import apply_rope, grid_table, rope_table, turn_heads

__all__ = [
    "Compressed",
    "Full",
    "MeanPool",
    "Memory",
    "MemoryPlan",
    "MemoryView",
    "Policy",
    "SinkWindow",
    "Window",
]


@dataclass(frozen=True)
class MeanPool:
    """Average keys and values over the tokens of a cell."""

    def __call__(self, kv: KV, *, factor: int, layer: int) -> KV:
        return KV(pool_cells(kv.k, factor=factor), pool_cells(kv.v, factor=factor))


class Memory:
    """Keys and values of a stream. Only `commit` and `reset` change what it holds.

    Args:
        plan: What is kept, of which network, on which grid.
        batch: Streams side by side.
        dtype: Of the stored keys and values.
        device: Where they are.
        pool: How tokens are pooled over cells.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pool: Pool = MeanPool(),
    ) -> None:
        self.plan, self.batch, self.pool = plan, batch, pool

        def buffer(tokens: int) -> Tensor:
            size = (plan.layers, batch, plan.heads, tokens, plan.head_width)
            return torch.zeros(size, dtype=dtype, device=device)

        self._stored = KV(buffer(plan.capacity), buffer(plan.capacity))
        self._staged = KV(buffer(plan.staged_tokens), buffer(plan.staged_tokens))
        # choosing by pose, every sample keeps latents of its own; else one row of the plan holds for all
        self._rows = [slice(i, i + 1) for i in range(batch)] if plan.policy.repositions else [slice(None)]
        self._latents, self._length, self._version = 0, 0, 0
        self._kept: list[tuple[int, ...]] = [()] * len(self._rows)
        self._poses: dict[int, Tensor] = {}  # of each latent held, (b, 4, 4)
        self._table: Tensor | None = None  # for reading, until the next commit

    # -- what it holds ---------------------------------------------------------------------------------------

    @property
    def latents(self) -> int:
        """How many latents have been committed."""
        return self._latents

    @property
    def block(self) -> int:
        """The block that comes next."""
        return self.plan.blocks_in(self._latents)

    @property
    def length(self) -> int:
        """Valid keys: what the next block sees besides itself."""
        return self._length

    @property
    def dtype(self) -> torch.dtype:
        return self._stored.k.dtype

    @property
    def device(self) -> torch.device:
        return self._stored.k.device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, scratch included."""
        return sum(x.nbytes for x in (*self._stored, *self._staged))

    def tokens(self, latents: int) -> int:
        """Return how many keys the block that ends at `latents` latents sees, its own included."""
        return self.plan.tokens(latents)

    def bytes(self, latents: int) -> int:
        """Return the size of such a memory planned for `latents` latents."""
        return self.plan.bytes(latents, batch=self.batch, dtype=self.dtype)

    def kept(self, sample: int = 0) -> tuple[int, ...]:
        """Return the latents kept behind the window for a sample, in order of their slots."""
        return self._kept[sample if self.plan.policy.repositions else 0]

    # -- reading ---------------------------------------------------------------------------------------------

    def view(self, *, fresh: bool = False) -> MemoryView:
        """Return what the next block attends to; `fresh` asks for its own keys and values, to commit."""
        return MemoryView(memory=self, times=self._times_of_next(), fresh=fresh, version=self._version)

    def _times_of_next(self) -> tuple[int, ...]:
        start = self._latents
        if self.plan.policy.repositions:  # places are those among what is held
            start = len(self._kept[0]) + min(self._latents, self.plan.ring)
        return tuple(range(start, start + len(self.plan.block(self.block))))

    def _joined(self, layer: int, current: KV) -> KV:
        """Return the valid keys, rotated, and values, followed by those of the current block."""
        keys, values = (stored[layer] for stored in self._stored)
        if self.plan.policy.repositions and self.length:
            past = apply_rope(keys[:, :, : self.length], self._table_of_kept())
            return KV(torch.cat([past, current.k.to(past.dtype)], dim=2), self._appended(values, current.v))
        return KV(self._appended(keys, current.k), self._appended(values, current.v))

    def _appended(self, stored: Tensor, x: Tensor) -> Tensor:
        start, end = self.length, self.length + x.shape[2]
        if torch.is_grad_enabled():  # a backward pass needs its keys after the buffer has moved on
            return torch.cat([stored[:, :, :start], x.to(stored.dtype)], dim=2)
        stored[:, :, start:end] = x
        return stored[:, :, :end]

    def _table_of_kept(self) -> Tensor:
        """Return the rotary table (b, 1, n, 2, d) of the valid keys at their places as re-mapped."""
        if self._table is None:
            positions = torch.stack([self._positions(kept) for kept in self._kept])
            plan, dtype = self.plan, torch.promote_types(self.dtype, torch.float32)
            table = rope_table(positions.flatten(0, 1), head_width=plan.head_width, factor=plan.rope_factor)
            self._table = table.to(self.device, dtype).unflatten(0, (len(positions), 1, -1))
        return self._table

    def _positions(self, kept: tuple[int, ...]) -> Tensor:
        plan, ring = self.plan, self.plan.ring
        window = range(max(0, self._latents - ring), self._latents)
        place = {latent: i for i, latent in enumerate(sorted((*kept, *window)))}
        by_slot = sorted(window, key=lambda latent: latent % ring)
        grids = [cell_positions([place[i] for i in by_slot], plan.rows, plan.columns)]
        grids += [
            cell_positions([place[i]], plan.rows, plan.columns, factor=plan.policy.factor(i)) for i in kept
        ]
        return torch.cat(grids)

    def _table_of(self, latents: list[int], factor: int) -> Tensor:
        plan, dtype = self.plan, torch.promote_types(self.dtype, torch.float32)
        return grid_table(
            latents, plan.rows, plan.columns, head_width=plan.head_width, factor=plan.rope_factor,
            cells=factor, dtype=dtype, device=self.device,
        )  # fmt: skip

    # -- writing ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def commit(self, fresh: Fresh, *, c2w: Tensor | None = None) -> None:
        """Store the next block's keys and values, as a pass over it with `view(fresh=True)` returned them.

        c2w: (b, t, 4, 4) poses of its latents (of their last frames) in d̄; needed by a policy that chooses
        by pose, and ignored by others.

        Raises:
            ValueError: If the plan has no room for the block, or sizes differ.
        """
        plan, latents = self.plan, self.plan.block(self.block)
        self._check(fresh, latents)
        if plan.policy.repositions:
            self._note_poses(latents, c2w)
        moves = self._make_room()
        if plan.ring:
            self._move_out(moves)
        writes, turns = self._writes(latents, moves), self._turns(latents, fresh[0].rays)
        for layer, kv in enumerate(fresh):
            forms = self._forms(layer, kv, latents, turns)
            for write in writes:
                for target, form in zip(write.target, forms[write.factor], strict=True):
                    target[layer, write.rows, :, write.at] = form[write.rows, :, write.tokens]
        self._latents, self._table, self._version = latents.stop, None, self._version + 1
        self._length = plan.window_tokens(latents.stop) + plan.slot_start(self._kept[0], len(self._kept[0]))

    def reset(self) -> None:
        """Forget everything."""
        self._latents, self._length, self._poses, self._table = 0, 0, {}, None
        self._kept = [()] * len(self._rows)
        self._version += 1

    def fork(self) -> Memory:
        """Return an independent copy."""
        other = copy.copy(self)
        other._stored = KV(*(x.clone() for x in self._stored))
        other._staged = KV(*(x.clone() for x in self._staged))
        other._kept, other._poses = list(self._kept), dict(self._poses)
        return other

    def _check(self, fresh: Fresh, latents: range) -> None:
        plan = self.plan
        if plan.num_latents is not None and latents.stop > plan.num_latents:
            raise ValueError(
                f"The memory is planned for num_latents={plan.num_latents}, which are committed; plan a "
                "longer horizon, or bound the memory (Window, SinkWindow, Compressed with max_latents)."
            )
        size = (self.batch, plan.heads, len(latents) * plan.tokens_per_latent, plan.head_width)
        if len(fresh) != plan.layers or any(x.shape != size for kv in fresh for x in kv[:2]):
            found = f"{len(fresh)} layers of {tuple(fresh[0].k.shape) if fresh else ()}"
            raise ValueError(
                f"Block {self.block} must bring keys and values of {plan.layers} layers of {size}; "
                f"got {found}."
            )

    def _note_poses(self, latents: range, c2w: Tensor | None) -> None:
        size = (self.batch, len(latents), 4, 4)
        if c2w is None or c2w.shape != size:
            found = None if c2w is None else tuple(c2w.shape)
            raise ValueError(
                f"c2w={found} must be the poses {size} of the block: max_latents chooses by them."
            )
        for place, latent in enumerate(latents):
            self._poses[latent] = c2w[:, place].double().cpu()
        held = {latent for kept in self._kept for latent in kept}
        held.update(range(latents.start - self.plan.ring, latents.stop))
        self._poses = {latent: pose for latent, pose in self._poses.items() if latent in held}

    def _make_room(self) -> list[list[tuple[int, int]]]:
        """Admit what leaves the window; return, for each row of the plan, (latent, slot) of what moves in."""
        plan, moves = self.plan, []
        for row, before in enumerate(self._kept):
            kept = before
            shown = partial(self._redundancy, row) if plan.policy.repositions else None
            for latent in plan.leaving(self.block):
                kept = admit(plan.policy, kept, latent, redundancy=shown)
            self._kept[row] = kept
            moves.append(
                [(i, slot) for slot, i in enumerate(kept) if slot >= len(before) or before[slot] != i]
            )
        return moves

    def _redundancy(self, row: int, latents: tuple[int, ...]) -> list[float]:
        poses = torch.stack([self._poses[i][row] for i in latents])
        shown: list[float] = redundancy(poses, reach=(1.0, self.plan.rows / self.plan.columns)).tolist()
        return shown

    def _move_out(self, moves: list[list[tuple[int, int]]]) -> None:
        """Copy what leaves the window into its slots, all layers at once, before the ring overwrites it."""
        plan = self.plan
        for rows, kept, moved in zip(self._rows, self._kept, moves, strict=True):
            for latent, slot in moved:
                to = plan.slot(kept, slot)
                if plan.policy.factor(latent) > 1:
                    source, at = self._staged, plan.staged(latent)
                else:
                    source, at = self._stored, plan.ringed(latent)
                for target, origin in zip(self._stored, source, strict=True):
                    target[:, rows, :, to] = origin[:, rows, :, at]

    def _writes(self, latents: range, moves: list[list[tuple[int, int]]]) -> list[_Write]:
        """Return where a block's forms go, alike for every layer."""
        plan, everyone, writes = self.plan, slice(None), []
        for latent in latents if plan.ring else ():
            factor = plan.policy.factor(latent)
            full = self._tokens_of(latent, latents, factor=1)
            writes.append(_Write(self._stored, everyone, plan.ringed(latent), 1, full))
            if factor > 1:
                pooled = self._tokens_of(latent, latents, factor=factor)
                writes.append(_Write(self._staged, everyone, plan.staged(latent), factor, pooled))
        if not plan.ring:  # without a past in the window, blocks go to their slots at once
            for rows, kept, moved in zip(self._rows, self._kept, moves, strict=True):
                for latent, slot in moved:
                    factor = plan.policy.factor(latent)
                    tokens = self._tokens_of(latent, latents, factor=factor)
                    writes.append(_Write(self._stored, rows, plan.slot(kept, slot), factor, tokens))
        return writes

    def _tokens_of(self, latent: int, latents: range, *, factor: int) -> slice:
        """Return where a latent lies among the latents of its block that have a form of this factor."""
        size = self.plan.tokens_per_latent if factor == 1 else self.plan.cells(latent)
        start = self._members(latents, factor).index(latent) * size
        return slice(start, start + size)

    def _members(self, latents: range, factor: int) -> list[int]:
        return [i for i in latents if factor == 1 or self.plan.policy.factor(i) == factor]

    def _places(self, members: list[int], latents: range) -> Tensor:
        return places_of(tuple(i - latents.start for i in members), self.device)

    def _turns(self, latents: range, rays: Rays | None) -> dict[int, Turns]:
        """Return how each form of a block is turned: full (1), and each factor that it is pooled by.

        Not by places if these may still move: then keys are rotated on reading.
        """
        plan, turns = self.plan, dict[int, Turns]()
        for factor in sorted({1, *map(plan.policy.factor, latents)} - {0}):
            members = self._members(latents, factor)
            rope = None if plan.policy.repositions else self._table_of(members, factor)
            places = self._places(members, latents)
            turns[factor] = turns_of(rays, places, factor=factor, of=len(latents), rope=rope)
        return turns

    def _forms(self, layer: int, fresh: FreshKV, latents: range, turns: dict[int, Turns]) -> dict[int, KV]:
        """Return the full form (1) and the pooled ones of a block, (b, k, n, d) each, latent after latent."""
        forms, grid = {}, (self.plan.rows, self.plan.columns)
        for factor, turn in turns.items():
            kv = KV(*fresh[:2])
            if factor > 1:
                places = self._places(self._members(latents, factor), latents)
                kv = pooled(kv, places, factor=factor, layer=layer, grid=grid, pool=self.pool)
            forms[factor] = turn(kv)
        return forms


class _Write(NamedTuple):
    """One copy: tokens of the form of a factor into a buffer, in every layer."""

    target: KV
    rows: slice
    at: slice
    factor: int
    tokens: slice


@dataclass(frozen=True, kw_only=True)
class MemoryView:
    """A memory as one pass over the next block reads it: a `Context`, valid until the next commit."""

    memory: Memory
    times: tuple[int, ...]
    fresh: bool
    version: int

    @property
    def factors(self) -> tuple[int, ...]:
        """The factors by which latents are pooled when they are committed."""
        return self.memory.plan.factors if self.fresh else ()

    def layer(self, index: int) -> MemoryLayer:
        return MemoryLayer(view=self, index=index)


@dataclass(frozen=True, kw_only=True)
class MemoryLayer:
    """The attention of one layer over a memory and the current block."""

    view: MemoryView
    index: int

    @torch.compiler.disable  # lengths differ from block to block; what is round it is compiled once
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, rope: Tensor, rays: Rays | None = None
    ) -> tuple[Tensor, FreshKV | None]:
        keys, values = self.read(k, v, rope=rope, rays=rays)
        out = attend(turn_heads(q, rope).to(keys.dtype), keys, values)
        return out.to(v.dtype), FreshKV(k, v, rays) if self.view.fresh else None

    def read(self, k: Tensor, v: Tensor, *, rope: Tensor, rays: Rays | None) -> KV:
        """Return all keys and values, turned: the window, what is behind it, the current block."""
        memory = self.view.memory
        if memory._version != self.view.version:
            raise ValueError(
                f"The memory changed ({memory.latents} latents now) after this view was taken: take a view "
                "for every pass, and with activation checkpointing run the backward pass before the next "
                "commit."
            )
        return memory._joined(self.index, Turns.of_tokens(rope, rays)(KV(k, v)))
