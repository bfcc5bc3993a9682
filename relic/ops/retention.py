"""What a memory keeps of the past: policies as values, and the plan they make, a pure function of indices.

Latents come in blocks: block 0 is the image latent alone, block b >= 1 the next `block_latents` latents. A
query in block b sees the latents of the window that ends with b in full, and of each older latent i what
`factor(i)` says: nothing (0), all of it (1), or cells of factor x factor tokens averaged to one. Masks,
pictures and the memory itself read the plan from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

__all__ = [
    "SCHEDULE",
    "AnyPolicy",
    "Compressed",
    "Full",
    "Policy",
    "SinkWindow",
    "Window",
    "admit",
    "block_range",
    "block_that_ends",
    "check_policy",
    "factors_seen",
    "parse_policy",
    "window_blocks",
    "window_start",
]

SCHEDULE = (1, 4, 2, 4, 4, 4, 2, 4, 4, 2, 4, 4, 4, 2, 4, 4, 2, 4)  # paper §4.2, a factor per side
IMAGE = 0  # the latent that is never given up
ROUND = 6  # digits by which views are told apart


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """What is kept. Sizes count latents; nothing here knows of tokens, layers or devices."""

    @property
    @abstractmethod
    def span(self) -> int | None:
        """Latents of the window, the current block included; None keeps everything in full."""

    @property
    @abstractmethod
    def room(self) -> int | None:
        """Latents kept behind the window at most; None for no limit."""

    @property
    def period(self) -> int:
        """Latents after which `factor` repeats."""
        return 1

    @property
    def repositions(self) -> bool:
        """Whether places in time are re-mapped as latents are given up."""
        return False

    @abstractmethod
    def factor(self, latent: int) -> int:
        """Return how coarsely a latent is kept behind the window: 0 not at all, 1 in full, else per side."""


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keep everything in full."""

    @property
    def span(self) -> int | None:
        return None

    @property
    def room(self) -> int | None:
        return None

    def factor(self, latent: int) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class Window(Policy):
    """Keep the last latents only.

    Args:
        latents: Length of the window, the current block included; a multiple of `block_latents`.
    """

    latents: int

    def __post_init__(self) -> None:
        _check_window("latents", self.latents)

    @property
    def span(self) -> int | None:
        return self.latents

    @property
    def room(self) -> int | None:
        return 0

    def factor(self, latent: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class SinkWindow(Policy):
    """Keep the first latents and the last ones.

    Args:
        sink: First latents, kept in full for ever, beside the window (1 is the image latent).
        window: Length of the window, the current block included; a multiple of `block_latents`.
    """

    sink: int
    window: int

    def __post_init__(self) -> None:
        _check_window("window", self.window)
        if self.sink < 1:
            raise ValueError(f"sink={self.sink} must be at least 1, the image latent; use Window for none.")

    @property
    def span(self) -> int | None:
        return self.window

    @property
    def room(self) -> int | None:
        return self.sink

    def factor(self, latent: int) -> int:
        return int(latent < self.sink)


@dataclass(frozen=True, kw_only=True)
class Compressed(Policy):
    """Keep a window in full and what is older, averaged over cells (paper §4.2).

    Args:
        window: Length of the window, the current block included; a multiple of `block_latents`.
        schedule: Factor per side of latent i is `schedule[i % len(schedule)]`; 1 keeps it in full, 0 gives it
            up: (1, 0, 0, 0, 0, 0) are keyframes. The first one, the image's, must be kept. 0 can't be had
            together with `max_latents`, which closes up places in time.
        max_latents: Most latents a query may see, for streams without an end; null keeps them all. Beyond it,
            of the latents of one factor the one makes room whose view the others show best, be it the newest;
            places in time are re-mapped, in order, to 0 ... max_latents - 1. So (1,) with `max_latents` holds
            the latents that together show most of what was seen.
    """

    window: int = 8
    schedule: tuple[int, ...] = SCHEDULE
    max_latents: int | None = None

    def __post_init__(self) -> None:
        _check_window("window", self.window)
        if not self.schedule or min(self.schedule) < 0 or self.schedule[0] == 0:
            raise ValueError(
                f"schedule={self.schedule} must hold factors (1 keeps in full, 0 not at all), the first of "
                "them at least 1."
            )
        if self.max_latents is None:
            return
        if 0 in self.schedule:
            raise ValueError(
                f"max_latents={self.max_latents} maps places in time to what is kept, so schedule="
                f"{self.schedule} can't give latents up (0): pool them, or set max_latents to null."
            )
        # a slot besides the image's for every factor, else a latent could find none to take over
        firsts = (
            next(i for i in range(1, self.period + 1) if self.factor(i) == factor)
            for factor in set(self.schedule)
        )
        least = self.window + max(firsts) + 1
        if self.max_latents < least:
            raise ValueError(
                f"max_latents={self.max_latents} must leave a latent of each factor of the schedule beside "
                f"the image behind a window of {self.window}; use at least {least}."
            )

    @property
    def span(self) -> int | None:
        return self.window

    @property
    def room(self) -> int | None:
        return None if self.max_latents is None else self.max_latents - self.window

    @property
    def period(self) -> int:
        return len(self.schedule)

    @property
    def repositions(self) -> bool:
        return self.max_latents is not None

    def factor(self, latent: int) -> int:
        return self.schedule[latent % len(self.schedule)]


AnyPolicy = Full | Window | SinkWindow | Compressed  # what a config may name, by its fields
WORDS = (
    "own, full, window:LATENTS, sink_window:SINK:LATENTS, compressed, compressed:LATENTS or "
    "compressed:LATENTS:SCHEDULE (1,4,2)"
)


def parse_policy(text: str, *, own: AnyPolicy) -> AnyPolicy:
    """Read a memory policy: `full`, `window:8`, `sink_window:1:8`, `compressed`, `compressed:8`,
    `compressed:8:1,4,2`, `own`.

    own: What `own` stands for. What `compressed` leaves open is taken from there if that is compressed, else
        as in the paper.

    Raises:
        ValueError: If it is none of these.
    """
    base = own if isinstance(own, Compressed) else Compressed()
    name, *sizes = text.split(":")
    if not all(part.isdecimal() for size in sizes for part in size.split(",")):
        raise ValueError(f"policy {text!r}: sizes are whole numbers of latents; known are {WORDS}.")
    match name, [tuple(int(part) for part in size.split(",")) for size in sizes]:
        case "own", []:
            return own
        case "full", []:
            return Full()
        case "window", [(latents,)]:
            return Window(latents=latents)
        case "sink_window", [(sink,), (window,)]:
            return SinkWindow(sink=sink, window=window)
        case "compressed", []:
            return base
        case "compressed", [(window,)]:
            return replace(base, window=window)
        case "compressed", [(window,), schedule]:
            return replace(base, window=window, schedule=schedule)
    raise ValueError(f"policy {text!r} is not known; known are {WORDS}.")


def _check_window(name: str, latents: int) -> None:
    if latents < 1:
        raise ValueError(f"{name}={latents} must be at least one block; use block_latents or a multiple.")


def check_policy(policy: Policy, *, block_latents: int) -> None:
    """Raise ValueError unless the window is a whole number of blocks."""
    if block_latents < 1:
        raise ValueError(f"block_latents={block_latents} must be at least 1; use 4, or 2 for low latency.")
    span = policy.span
    if span is not None and span % block_latents:
        lower = span // block_latents * block_latents
        near = f"{lower} or {lower + block_latents}" if lower else str(block_latents)
        raise ValueError(
            f"A window of {span} latents must be a multiple of block_latents={block_latents}; use {near}."
        )


def block_range(block: int, *, block_latents: int) -> range:
    """Return the latents of a block: the image for block 0, then `block_latents` each."""
    return range(1) if block == 0 else range(1 + (block - 1) * block_latents, 1 + block * block_latents)


def block_that_ends(latents: int, *, block_latents: int) -> int:
    """Return the block after which there are `latents` latents.

    Raises:
        ValueError: If `latents` is not the image and whole blocks.
    """
    block, rest = divmod(latents - 1, block_latents)
    if latents < 1 or rest:
        lower = max(1, 1 + block * block_latents)
        raise ValueError(
            f"{latents} latents must be the image and whole blocks of {block_latents}; use {lower} or "
            f"{lower + block_latents}."
        )
    return block


def window_blocks(policy: Policy, *, block_latents: int) -> int:
    """Return the length of the window in blocks; where all is kept in full, the current block alone."""
    return 1 if policy.span is None else policy.span // block_latents


def window_start(policy: Policy, block: int, *, block_latents: int) -> int:
    """Return the first latent of the window that ends with `block`."""
    first = block + 1 - window_blocks(policy, block_latents=block_latents)
    return block_range(max(first, 0), block_latents=block_latents).start


def factors_seen(
    policy: Policy, block: int, *, block_latents: int, kept: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Return how a query in `block` sees each latent up to the end of its block: 0 not, 1 in full, else
    pooled.

    kept: latents kept behind the window, from `admit`, for policies that choose by pose; by default every one
    that the policy keeps.
    """
    start = window_start(policy, block, block_latents=block_latents)
    end = block_range(block, block_latents=block_latents).stop
    if kept is None:
        if policy.repositions and policy.room is not None and start > policy.room:
            raise ValueError(
                f"Block {block} comes after latents were given up by pose (max_latents); say which are "
                "`kept`."
            )
        kept = tuple(range(start))
    older = tuple(policy.factor(i) if i in kept else 0 for i in range(start))
    return older + (1,) * (end - start)


def admit(
    policy: Policy,
    kept: tuple[int, ...],
    latent: int,
    *,
    redundancy: Callable[[tuple[int, ...]], Sequence[float]] | None = None,
) -> tuple[int, ...]:
    """Return what is kept behind the window once `latent` has left it, one latent a slot.

    A latent takes a fresh slot while there is room, and then that of the most redundant latent of its own
    factor, so that slots never change size; if that is itself, it is given up. Of equals the newest goes, the
    further from the truth. The image latent stays.

    redundancy: How well the views of each of these latents are shown by the others, in [0, 1]; needed once
        room is short.
    """
    factor = policy.factor(latent)
    if factor == 0:
        return kept
    if policy.room is None or len(kept) < policy.room:
        return (*kept, latent)
    if redundancy is None:
        raise ValueError(
            f"All {policy.room} slots are taken: give poses, by which a latent can be chosen to make room."
        )
    rivals = (*kept, latent)
    shares = dict(zip(rivals, redundancy(rivals), strict=True))
    candidates = [i for i in rivals if i != IMAGE and policy.factor(i) == factor]
    leaves = max(candidates, key=lambda i: (round(shares[i], ROUND), i))
    return tuple(latent if i == leaves else i for i in kept)
