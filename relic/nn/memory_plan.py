"""Sizes and addresses of a memory, all known before anything runs and without touching a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from relic.nn.dit import DiTConfig
from relic.ops.pooling import cell_grid
from relic.ops.retention import (
    Policy,
    block_range,
    block_that_ends,
    check_policy,
    window_blocks,
    window_start,
)
from relic.types import PATCH, ClipSpec, latents_of

__all__ = ["MemoryPlan"]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """A policy, applied to a network and a grid of tokens.

    Args:
        policy: What is kept.
        block_latents: Latents generated at a time.
        rows: Token rows of a latent.
        columns: Token columns of a latent.
        num_latents: Horizon in latents, the image and whole blocks; null for a stream without an end, which
            takes a policy that is bounded.
        layers: Blocks of the network.
        heads: Its attention heads.
        head_width: Their width.
        rope_factor: YaRN factor of its time axis.
    """

    policy: Policy
    block_latents: int
    rows: int
    columns: int
    num_latents: int | None
    layers: int
    heads: int
    head_width: int
    rope_factor: float = 1.0

    def __post_init__(self) -> None:
        check_policy(self.policy, block_latents=self.block_latents)
        for latent in range(self.policy.period):
            if self.policy.factor(latent) > 1:
                cell_grid(self.rows, self.columns, factor=self.policy.factor(latent))
        if self.num_latents is None:
            if self.policy.room is None:
                raise ValueError(
                    f"{self.policy} keeps everything, so it needs a horizon; set num_latents, or bound it "
                    "(Window, SinkWindow, Compressed with max_latents)."
                )
        elif self.num_latents < 1 + self.block_latents:
            raise ValueError(
                f"num_latents={self.num_latents} holds no block of {self.block_latents} after the image; use "
                f"at least {1 + self.block_latents}."
            )
        else:
            block_that_ends(self.num_latents, block_latents=self.block_latents)

    @classmethod
    def of(cls, net: DiTConfig, clip: ClipSpec, policy: Policy, *, endless: bool = False) -> MemoryPlan:
        """Return the plan of a network for the longest horizon of a clip, or for a stream without an end."""
        return cls(
            policy=policy,
            block_latents=clip.block_latents,
            rows=clip.latent_height // PATCH,
            columns=clip.latent_width // PATCH,
            num_latents=None if endless else latents_of(clip.max_frames),
            layers=net.depth,
            heads=net.heads,
            head_width=net.head_width,
            rope_factor=net.rope_factor,
        )

    # -- indices ---------------------------------------------------------------------------------------------

    @property
    def tokens_per_latent(self) -> int:
        return self.rows * self.columns

    @property
    def ring(self) -> int:
        """Latents of the window besides the current block; latent i lies in place `i % ring`."""
        return (window_blocks(self.policy, block_latents=self.block_latents) - 1) * self.block_latents

    @cached_property
    def factors(self) -> tuple[int, ...]:
        """The factors by which latents are pooled, in order."""
        return tuple(sorted({self.policy.factor(i) for i in range(self.policy.period)} - {0, 1}))

    def block(self, index: int) -> range:
        """Return the latents of a block."""
        return block_range(index, block_latents=self.block_latents)

    def blocks_in(self, latents: int) -> int:
        """Return how many blocks `latents` latents are, the image counted as one."""
        return block_that_ends(latents, block_latents=self.block_latents) + 1 if latents else 0

    def leaving(self, block: int) -> range:
        """Return the latents that are in the window of `block` and no longer in the next one's."""
        now, after = (
            window_start(self.policy, b, block_latents=self.block_latents) for b in (block, block + 1)
        )
        return range(now, after)

    def cells(self, latent: int) -> int:
        """Return the tokens that stand for a latent once it is behind the window."""
        factor = self.policy.factor(latent)
        return math.prod(cell_grid(self.rows, self.columns, factor=factor)) if factor else 0

    # -- sizes -----------------------------------------------------------------------------------------------

    def tokens(self, latents: int) -> int:
        """Return how many keys the block that ends at `latents` latents sees, its own included.

        Raises:
            ValueError: If `latents` is not the image and whole blocks.
        """
        block = block_that_ends(latents, block_latents=self.block_latents)
        start = window_start(self.policy, block, block_latents=self.block_latents)
        older = [self.cells(i) for i in range(start) if self.policy.factor(i)][: self.policy.room]
        return (latents - start) * self.tokens_per_latent + sum(older)

    def bytes(self, latents: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Return the bytes of all buffers of a memory planned for `latents` latents."""
        tokens = self.tokens(latents) + self._staged_tokens(latents)
        return 2 * self.layers * batch * self.heads * self.head_width * dtype.itemsize * tokens

    @cached_property
    def longest(self) -> int:
        """The horizon, or for a stream without an end a length after which no size changes any more."""
        if self.num_latents is not None:
            return self.num_latents
        room = -(-(self.policy.room or 0) // self.block_latents) * self.block_latents
        # after a period of blocks, every kind of block has been in the window
        return 1 + room + self.ring + self.block_latents * (1 + self.policy.period)

    @cached_property
    def capacity(self) -> int:
        """Tokens of the main buffer: the most that a block sees, itself included."""
        return self.tokens(self.longest)

    @cached_property
    def staged_tokens(self) -> int:
        """Tokens of the staging buffer: pooled forms of the blocks in the window."""
        return self._staged_tokens(self.longest)

    def _staged_tokens(self, latents: int) -> int:
        blocks = block_that_ends(latents, block_latents=self.block_latents) + 1
        return self.ring // self.block_latents * self._stage_size(blocks)

    def _stage_size(self, blocks: int) -> int:
        return max(sum(map(self._staged_cells, self.block(b))) for b in range(blocks))

    def _staged_cells(self, latent: int) -> int:
        return self.cells(latent) if self.policy.factor(latent) > 1 else 0

    # -- addresses -------------------------------------------------------------------------------------------

    def window_tokens(self, latents: int) -> int:
        """Return the length of the window's part of the prefix after `latents` latents."""
        return min(latents, self.ring) * self.tokens_per_latent

    def ringed(self, latent: int) -> slice:
        """Return where a latent lies in the window."""
        start = latent % self.ring * self.tokens_per_latent
        return slice(start, start + self.tokens_per_latent)

    def staged(self, latent: int) -> slice:
        """Return where the pooled form of a latent in the window waits."""
        block = -(-latent // self.block_latents)
        places, first = self.ring // self.block_latents, self.block(block).start
        start = block % places * (self.staged_tokens // places)
        start += sum(map(self._staged_cells, range(first, latent)))
        return slice(start, start + self.cells(latent))

    def slot_start(self, kept: tuple[int, ...], slot: int) -> int:
        """Return the tokens of the slots before `slot`."""
        return sum(map(self.cells, kept[:slot]))

    def slot(self, kept: tuple[int, ...], slot: int) -> slice:
        """Return where a slot behind a full window lies."""
        start = self.ring * self.tokens_per_latent + self.slot_start(kept, slot)
        return slice(start, start + self.cells(kept[slot]))
