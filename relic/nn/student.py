"""What a student is beside its weights: sizes, memory policy and steps, kept in the header of its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from relic.nn.denoiser import Denoiser
from relic.nn.dit import DiTConfig
from relic.nn.memory_plan import MemoryPlan
from relic.nn.text import WordTableConfig
from relic.ops.flow import sigma_schedule
from relic.ops.retention import AnyPolicy, Compressed, Full, SinkWindow, Window
from relic.types import ClipSpec

__all__ = ["POLICIES", "FewSteps", "StudentConfig"]

POLICIES: dict[str, type[AnyPolicy]] = {
    "full": Full, "window": Window, "sink_window": SinkWindow, "compressed": Compressed
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """How a block is denoised and what of it is remembered.

    Args:
        steps: Denoising steps a block.
        shift: Warp of the noise levels towards noise; 4 steps shifted by 5 are the timesteps 1000, 937.5,
            833.3 and 625.
        context: What is committed: `clean`, keys and values of one more pass over the finished block at noise
            level 0, or `last_step`, those of the last denoising step, which saves that pass.
    """

    steps: int = 4
    shift: float = 5.0
    context: Literal["clean", "last_step"] = "clean"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; 4 is the published number.")
        if self.shift < 1.0:
            raise ValueError(f"shift={self.shift} must be at least 1 (none).")
        if self.context not in ("clean", "last_step"):
            raise ValueError(f"context={self.context!r} must be 'clean' or 'last_step'.")

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise level of each step, from 1 down."""
        return tuple(sigma_schedule(self.steps, shift=self.shift)[:-1].tolist())

    @property
    def context_level(self) -> float:
        """The noise level at which blocks are committed; the image always is at 0."""
        return 0.0 if self.context == "clean" else self.levels[-1]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Everything that rebuilds a student but its weights.

    Args:
        net: Sizes of the DiT.
        words: Its word table, or None if prompts are embeddings.
        clip: Shape of what it generates; the longest horizon is the one it was trained to.
        policy: What its memory keeps.
        sampler: Its steps, and what is committed.
    """

    net: DiTConfig
    words: WordTableConfig | None
    clip: ClipSpec
    policy: AnyPolicy
    sampler: FewSteps

    def build(self) -> Denoiser:
        """Return the network with fresh weights."""
        return Denoiser(self.net, self.words)

    def plan(self, *, endless: bool = False) -> MemoryPlan:
        """Return the sizes of its memory over its longest horizon, or over a stream without an end."""
        return MemoryPlan.of(self.net, self.clip, self.policy, endless=endless)

    def to_header(self) -> dict[str, Any]:
        """Return plain values for the header of a weights file."""
        kind = next(name for name, policy in POLICIES.items() if type(self.policy) is policy)
        return {
            "dit": dataclasses.asdict(self.net),
            "words": dataclasses.asdict(self.words) if self.words else None,
            "clip": dataclasses.asdict(self.clip),
            "policy": {"kind": kind, **dataclasses.asdict(self.policy)},
            "sampler": dataclasses.asdict(self.sampler),
        }

    @classmethod
    def from_header(cls, values: Mapping[str, Any]) -> StudentConfig:
        """Rebuild from what `to_header` gave, read from JSON, which has no tuples.

        Raises:
            ValueError: If the policy is one that this version does not know.
        """
        policy: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["policy"].items()
        }
        kind = policy.pop("kind")
        if kind not in POLICIES:
            raise ValueError(f"The student's policy {kind!r} is unknown; known are {', '.join(POLICIES)}.")
        clip: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["clip"].items()}
        return cls(
            net=DiTConfig.from_dict(values["dit"]),
            words=WordTableConfig(**values["words"]) if values["words"] else None,
            clip=ClipSpec(**clip),
            policy=POLICIES[kind](**policy),
            sampler=FewSteps(**values["sampler"]),
        )
