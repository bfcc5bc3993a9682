"""The autoregressive generator: one for training, validation and serving (paper §4.3-4.5).

A block starts from noise, is denoised in a few steps with fresh noise between them, and is then committed to
the memory; the network itself never writes. Streaming is the primitive, a clip is a fold over it:

    rollout.prefill(image, actions[:, :1], text=text)
    clip = torch.cat([image, *(block.latents for block in rollout(stretches, text=text))], dim=1)

Actions come as they are, a stretch at a time, and the rollout integrates them; or walked before (`walk`), for
a training pass that must not wait for the host.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from relic.nn.context import Fresh, Prompt
from relic.nn.denoiser import Denoiser
from relic.nn.memory import Memory
from relic.nn.student import FewSteps
from relic.ops.camera import pose_features
from relic.ops.flow import add_noise, x0_of
from relic.ops.odometry import Odometry, advance
from relic.ops.randomness import keyed_normal
from relic.types import TIME_STRIDE, Block, Controls

__all__ = ["DrawnNoise", "FewSteps", "KeyedNoise", "Noise", "Rollout", "Trace", "Walk", "walk"]


class Noise(Protocol):
    """Where a rollout's noise comes from."""

    def __call__(self, *, block: int, step: int, like: Tensor) -> Tensor:
        """Return standard normal noise in the shape of `like` (b, t, c, h, w) for a step of a block."""


@dataclass(frozen=True)
class KeyedNoise:
    """Noise as a function of (key, purpose, block, step): the same however and wherever blocks are generated.

    Args:
        keys: One key a sample.
        purpose: What else tells this noise from other noise: seed, stage, what it is for.
    """

    keys: tuple[int, ...]
    purpose: tuple[int | str, ...] = ("rollout",)

    def __call__(self, *, block: int, step: int, like: Tensor) -> Tensor:
        return keyed_normal(self.keys, *self.purpose, block, step, like=like)


@dataclass(frozen=True)
class DrawnNoise:
    """Noise that was drawn before: (blocks, steps, b, t, c, h, w), the first one that of block 1."""

    drawn: Tensor

    def __call__(self, *, block: int, step: int, like: Tensor) -> Tensor:
        return self.drawn[block - 1, step].to(like.dtype)


class Walk(NamedTuple):
    """A stretch of the stream as walked: what the network is given, and poses c2w (b, t, 4, 4) of each
    latent's last frame, float64 on the host.
    """

    controls: Controls
    c2w: Tensor

    @property
    def frames(self) -> int:
        return self.controls.actions.shape[1]

    def cut(self, *, frames: int, latents: int) -> tuple[Walk, Walk]:
        """Return the first frames, which are so many latents, and the rest."""
        (actions, poses), c2w = self.controls, self.c2w
        assert poses is not None
        first = Controls(actions=actions[:, :frames], poses=poses[:, :frames])
        rest = Controls(actions=actions[:, frames:], poses=poses[:, frames:])
        return Walk(first, c2w[:, :latents]), Walk(rest, c2w[:, latents:])


def walk(
    actions: Tensor, *, odometry: Odometry | None = None, device: torch.device | str
) -> tuple[Walk, Odometry]:
    """Integrate actions (b, f, 13), of whole latents, from where `odometry` stands: the start of a stream by
    default.
    """
    odometry, c2w = advance(odometry or Odometry.origin(len(actions)), actions)
    poses = pose_features(c2w).to(device)
    at = slice((c2w.shape[1] - 1) % TIME_STRIDE, None, TIME_STRIDE)
    return Walk(Controls(actions=actions.to(device), poses=poses), c2w[:, at]), odometry


class Trace(NamedTuple):
    """What training needs to compute a block again. Latents are (b, t, c, h, w).

    xt, sigma: input and noise level of the step that is scored and replayed.
    x0: what that step predicted, which is what is scored.
    context, context_sigma: the pass that was committed.
    """

    block: int
    walk: Walk
    text: Tensor
    xt: Tensor
    sigma: float
    x0: Tensor
    context: Tensor
    context_sigma: float


class Rollout:
    """Generate block after block. It owns the place in the stream; the memory owns keys and values.

    Args:
        net: The student.
        memory: Its memory, empty.
        noise: Where noise comes from.
        sampler: Steps and what is committed.
        exit_step: Training only: the step, from 0, whose input is kept in `traces` for every block. All steps
            run whatever it is.
    """

    def __init__(
        self,
        net: Denoiser,
        memory: Memory,
        *,
        noise: Noise,
        sampler: FewSteps = FewSteps(),  # noqa: B008 - frozen
        exit_step: int | None = None,
    ) -> None:
        if exit_step is not None and not 0 <= exit_step < sampler.steps:
            raise ValueError(
                f"exit_step={exit_step} must be one of the {sampler.steps} steps, 0 to {sampler.steps - 1}."
            )
        if memory.latents:
            raise ValueError(f"The memory holds {memory.latents} latents of another stream: reset it first.")
        factors = net.dit.config.rope_factor, memory.plan.rope_factor
        if factors[0] != factors[1]:
            raise ValueError(
                f"The network's rope_factor={factors[0]} and the memory's {factors[1]} must be equal, or old "
                "keys lie elsewhere in time than new ones; use MemoryPlan.of(net.dit.config, ...)."
            )
        self.net, self.memory, self.noise = net, memory, noise
        self.sampler, self.exit_step = sampler, exit_step
        self._odometry: Odometry | None = None
        self._like: Tensor | None = None  # a latent, for its shape
        self._prompt: tuple[Tensor, Prompt] | None = None
        self._context: Tensor | None = None  # of the block that was generated last
        self._traces: list[Trace] = []

    # -- streaming -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, latents: Tensor, actions: Tensor | Walk, *, text: Tensor) -> None:
        """Commit true latents: the image first, with or without the blocks after it, or further blocks.

        latents: (b, t, c, h, w); actions: (b, f, 13), 1 frame for the image and 4 for each other latent, or
        walked before. With `context="last_step"` blocks are committed as generated ones are, at that step's
        noise level.
        """
        start, given = self.memory.latents, latents.shape[1]
        last = self.memory.plan.blocks_in(start + given) - 1
        frames = TIME_STRIDE * given - (0 if start else TIME_STRIDE - 1)
        if _frames(actions) != frames:
            raise ValueError(
                f"{given} latents from latent {start} on take {frames} frames of actions; "
                f"got {_frames(actions)}."
            )
        for index in range(self.memory.block, last + 1):
            size, frames = self._size(index)
            x0, latents = latents[:, :size], latents[:, size:]
            if isinstance(actions, Walk):
                stretch, actions = actions.cut(frames=frames, latents=size)
                controls, c2w = self._steer(stretch)
            else:
                controls, c2w = self._steer(actions[:, :frames])
                actions = actions[:, frames:]
            sigma = self.sampler.context_level if index else 0.0
            if sigma:
                drawn = self.noise(block=index, step=self.sampler.steps - 1, like=x0)
                x0 = add_noise(x0, drawn, sigma=self._levels(x0, sigma))
            self.memory.commit(self._encode(x0, sigma, controls, text), c2w=c2w)
            self._like = x0[:, :1]

    def __call__(
        self, actions: Iterable[Tensor | Walk], *, text: Tensor | Iterable[Tensor]
    ) -> Iterator[Block]:
        """Yield a generated block for each stretch of actions (b, 4·block_latents, 13), as they are or walked
        before.

        text: one prompt for all blocks, or one for each.
        """
        prompts = repeat(text) if isinstance(text, Tensor) else text
        for stretch, prompt in zip(actions, prompts, strict=not isinstance(text, Tensor)):
            yield self.step(stretch, text=prompt)

    @torch.no_grad()
    def step(self, actions: Tensor | Walk, *, text: Tensor) -> Block:
        """Generate, commit and return the next block. actions: (b, 4·block_latents, 13), or walked before."""
        index = self.memory.block
        size, frames = self._size(index)
        if self._like is None:
            raise ValueError("A rollout starts from an image: prefill its latent first.")
        if _frames(actions) != frames:
            raise ValueError(f"A block takes {frames} frames of actions; got {_frames(actions)}.")
        controls, c2w = walked = self._steer(actions)
        levels, like = self.sampler.levels, self._like.expand(-1, size, -1, -1, -1)
        x0 = xt = self.noise(block=index, step=0, like=like)
        passes: list[tuple[Tensor, Tensor]] = []
        fresh: Fresh = ()
        for number, sigma in enumerate(levels):
            if number:
                drawn = self.noise(block=index, step=number, like=like)
                xt = add_noise(x0, drawn, sigma=self._levels(like, sigma))
            commits = self.sampler.context == "last_step" and number == len(levels) - 1
            x0, fresh = self._denoise(xt, sigma, controls, self._read(text), fresh=commits)
            passes.append((xt, x0))
        if self.sampler.context == "clean":
            fresh = self._encode(x0, 0.0, controls, text)
        self.memory.commit(fresh, c2w=c2w)
        self._context = context = x0 if self.sampler.context == "clean" else xt
        if self.exit_step is not None:
            kept_xt, kept_x0 = passes[self.exit_step]
            self._traces.append(
                Trace(
                    block=index, walk=walked, text=text, xt=kept_xt, sigma=levels[self.exit_step],
                    x0=kept_x0, context=context, context_sigma=self.sampler.context_level,
                )
            )  # fmt: skip
        return Block(latents=x0, controls=controls, index=index)

    @property
    def context(self) -> Tensor:
        """What was committed of the last generated block (b, t, c, h, w), at `sampler.context_level`."""
        if self._context is None:
            raise ValueError("No block was generated yet: step first.")
        return self._context

    @torch.no_grad()
    def again(self, context: Tensor, actions: Tensor, *, text: Tensor) -> Block:
        """Commit a generated block again from its `context`, in one pass, and return it.

        With the same stream before it, it is the same to the last bit. context: (b, t, c, h, w); actions:
        (b, 4·t, 13).
        """
        index = self.memory.block
        size, frames = self._size(index)
        if context.shape[1] != size or actions.shape[1] != frames or not index:
            raise ValueError(
                f"Block {index} is {size} latents of {frames} frames, after an image; got {context.shape[1]} "
                f"latents and {actions.shape[1]} frames of actions."
            )
        controls, c2w = self._steer(actions)
        level = self.sampler.context_level
        x0, fresh = self._denoise(context, level, controls, self._read(text), fresh=True)
        self.memory.commit(fresh, c2w=c2w)
        self._context = context
        return Block(latents=x0, controls=controls, index=index)

    def reset(self) -> None:
        """Forget the stream. Also for a prompt to be read anew after the weights have changed."""
        self.memory.reset()
        self._odometry = self._like = self._prompt = self._context = None
        self._traces = []

    def fork(self) -> Rollout:
        """Return an independent rollout that stands where this one does."""
        other = copy.copy(self)
        other.memory, other._traces = self.memory.fork(), list(self._traces)
        return other

    # -- training --------------------------------------------------------------------------------------------

    @property
    def traces(self) -> tuple[Trace, ...]:
        """What was kept of each generated block, if there is an `exit_step`."""
        return tuple(self._traces)

    def replay(self, traces: Iterable[Trace]) -> Iterator[tuple[Trace, Tensor]]:
        """Yield for each block its trace and x0 of its exit step, computed again with gradients.

        Prefill the same latents first. A block is committed when the next one is asked for, so run its
        backward pass before; only what the policy keeps is held. Gradients reach the network's weights
        through this one step; the memory is a constant.
        """
        for trace in traces:
            if trace.block != self.memory.block:
                raise ValueError(
                    f"The trace is of block {trace.block}; the memory is at block {self.memory.block}: "
                    "reset, prefill, and replay the blocks in order."
                )
            # older torch keeps weights as autocast cast them without gradients, and would find them here
            torch.clear_autocast_cache()
            with torch.enable_grad():
                x0, _ = self._denoise(trace.xt, trace.sigma, trace.walk.controls, trace.text)
            yield trace, x0
            del x0
            with torch.no_grad():
                fresh = self._encode(trace.context, trace.context_sigma, trace.walk.controls, trace.text)
                self.memory.commit(fresh, c2w=trace.walk.c2w)
                self._odometry = None  # where it stood is not where the stream now is

    # -- parts -----------------------------------------------------------------------------------------------

    def _size(self, block: int) -> tuple[int, int]:
        """Return latents and frames of a block."""
        size = len(self.memory.plan.block(block))
        return size, TIME_STRIDE * size if block else 1

    def _steer(self, actions: Tensor | Walk) -> Walk:
        """Walk on, unless that was done before."""
        if isinstance(actions, Walk):
            self._odometry = None
            return actions
        if self._odometry is None and self.memory.latents:
            raise ValueError(
                "The stream was walked before, or replayed, up to here: walk the stretches after it as well."
            )
        walked, self._odometry = walk(actions, odometry=self._odometry, device=self.memory.device)
        return walked

    def _read(self, text: Tensor) -> Prompt:
        """Return the prompt as blocks read it, computed once as long as the same tensor comes in."""
        if self._prompt is None or self._prompt[0] is not text:
            self._prompt = (text, self.net.read(text))
        return self._prompt[1]

    def _levels(self, like: Tensor, sigma: float) -> Tensor:
        return torch.full(like.shape[:2], sigma, dtype=torch.float64, device=like.device)

    def _denoise(
        self, xt: Tensor, sigma: float, controls: Controls, text: Tensor | Prompt, *, fresh: bool = False
    ) -> tuple[Tensor, Fresh]:
        """Return x0 as predicted from xt, and fresh keys and values if asked for. Changes nothing."""
        level = self._levels(xt, sigma)
        view = self.memory.view(fresh=fresh)
        velocity, kv = self.net(xt, sigma=level, text=text, controls=controls, memory=view)
        return x0_of(xt, velocity, sigma=level), kv

    def _encode(self, latents: Tensor, sigma: float, controls: Controls, text: Tensor) -> Fresh:
        """Return the keys and values of latents at their noise level."""
        return self._denoise(latents, sigma, controls, self._read(text), fresh=True)[1]


def _frames(actions: Tensor | Walk) -> int:
    return actions.frames if isinstance(actions, Walk) else actions.shape[1]
