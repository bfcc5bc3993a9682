"""A world that is being played: a rollout, the autoencoder's streams around it, and ways back.

    session = world.start(image, "a red room", seed=0)
    frames = session.step(actions)  # one block: (f, 13) -> uint8 (f, h, w, 3)

Actions are in d̄ and degrees, and so are the poses that networks see; no scene unit enters here.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor

from relic.ops.actions import CHANNELS, STATIC
from relic.ops.video import from_uint8, to_uint8
from relic.rollout import Rollout
from relic.types import TIME_STRIDE, Block

__all__ = ["Codec", "Session", "Snapshot"]

FORMAT = "relic-session/2"


class Codec(Protocol):
    """An autoencoder that streams; see `relic.nn.tiny_vae.TinyVAE`."""

    def encode_stream(self, video: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return latents and the state for the next call."""

    def decode_stream(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return video and the state for the next call."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """What a session can be computed again from. It holds no keys and values, and no pixels.

    Latents are kept up to the longest history that the memory holds whole: of a world with a horizon that is
    all of them, of an endless one the true blocks and `max_latents` at most. The log of actions and prompts
    is always whole (about 1 kB a second).

    Args:
        world: Hash of the student it was played with.
        played: Memory and steps that it was played with, in words.
        seed: Seed of all noise.
        true_blocks: Blocks from the start that were given, not generated; at least the image.
        prompts: One a block, the image's first.
        actions: (f, 13) float32 of all frames.
        latents: (t, c, h, w), as they were committed, of the first blocks.
    """

    world: str
    played: str
    seed: int
    true_blocks: int
    prompts: tuple[str, ...]
    actions: Tensor
    latents: Tensor

    def save(self, path: str | Path) -> None:
        """Write it to a file."""
        torch.save({"format": FORMAT, **vars(self)}, path)

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read it from a file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is of another format.
        """
        values = torch.load(path, weights_only=True, map_location="cpu")
        found = values.pop("format", None) if isinstance(values, dict) else None
        if found != FORMAT:
            raise ValueError(
                f"{path} says {found!r}, this version reads {FORMAT!r}; take the snapshot again with this "
                "version."
            )
        return cls(**values)


class _Place(NamedTuple):
    """Where a session stands."""

    rollout: Rollout
    encoder: Any
    decoder: Any
    shown: Tensor


class Session:
    """Play a world from an image, block by block; the same actions, prompts and seed give the same frames.

    Args:
        rollout_of: Returns a fresh rollout of one stream, whose noise belongs to the seed it is given.
        vae: The autoencoder.
        image: (h, w, 3) uint8, the first frame.
        prompt: What is there; it may be changed between blocks.
        read: Turns a prompt into what the network takes, (1, n) word ids or (1, n, d) embeddings.
        fps: Frames a second.
        seed: Seed of all noise.
        undo_seconds: How far `undo` can go back. Each block of these is a copy of the memory, so the cost is
            the memory's `nbytes` times the blocks; 0 keeps none.
        world: Hash of the student, by which a snapshot is told from those of other worlds.

    Attributes:
        prompt: Prompt of the next block.
        shown: (h, w, 3) uint8, the last frame; at the start the image as the autoencoder shows it.
        rollout: The stream itself.
        block: What was generated last; None before the first step.
    """

    prompt: str
    shown: Tensor
    rollout: Rollout
    block: Block | None
    _seed: int
    _words: tuple[str, Tensor]
    _encoder: Any  # None once true frames can no longer follow
    _decoder: Any
    _true: int
    _log: list[tuple[Tensor, str]]  # actions (f, 13) and prompt of each block
    _kept: list[Tensor]  # latents as committed of the first blocks, (t, c, h, w) on the CPU
    _copies: deque[_Place]

    def __init__(
        self,
        rollout_of: Callable[[int], Rollout],
        vae: Codec,
        *,
        image: Tensor,
        prompt: str,
        read: Callable[[str], Tensor],
        fps: float,
        seed: int = 0,
        undo_seconds: float = 10.0,
        world: str = "",
    ) -> None:
        if not (math.isfinite(undo_seconds) and undo_seconds >= 0):
            raise ValueError(f"undo_seconds={undo_seconds} must be 0 (no undo) or more; 10 is the default.")
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != torch.uint8:
            raise ValueError(f"image is {tuple(image.shape)} {image.dtype}; it must be (h, w, 3) uint8.")
        self.fps, self.world = fps, world
        self._rollout_of, self._vae, self._read = rollout_of, vae, read
        self._undo_seconds = undo_seconds
        self._begin(seed, prompt=prompt)
        latents, self._encoder = self._encoded(image[None], None)
        still = torch.zeros(1, len(CHANNELS))
        still[:, STATIC] = 1.0
        self._commit_true(latents, still)

    # -- where it stands -------------------------------------------------------------------------------------

    @property
    def frames(self) -> int:
        """Frames of a block, and so of the actions of a step."""
        return TIME_STRIDE * self.rollout.memory.plan.block_latents

    @property
    def num_frames(self) -> int:
        """Frames so far, the image included."""
        return 1 + (len(self._log) - 1) * self.frames

    @property
    def blocks_left(self) -> int | None:
        """Blocks until the horizon; None for an endless world."""
        plan = self.rollout.memory.plan
        ends = plan.num_latents
        return None if ends is None else (ends - self.rollout.memory.latents) // plan.block_latents

    @property
    def blocks_to_undo(self) -> int:
        """How many blocks `undo` can take back now."""
        return len(self._copies)

    @property
    def text(self) -> Tensor:
        """The prompt as the network takes it."""
        if self._words[0] != self.prompt:  # the same tensor for the same prompt, which the rollout reads once
            self._words = (self.prompt, self._read(self.prompt))
        return self._words[1]

    # -- playing ---------------------------------------------------------------------------------------------

    def prefill(self, video: Tensor, actions: Tensor) -> None:
        """Commit true blocks after the image, before any block is generated.

        video: (f, h, w, 3) uint8, whole blocks; actions: (f, 13).

        Raises:
            ValueError: If shapes don't fit, a block was generated already, or the horizon ends before.
        """
        blocks = max(1, len(video) // self.frames)
        self._check(actions, blocks=blocks)
        size = (blocks * self.frames, *self.shown.shape)
        if video.shape != size or video.dtype != torch.uint8:
            raise ValueError(
                f"video is {tuple(video.shape)} {video.dtype}; it must be whole blocks of {self.frames} "
                f"frames, {size} uint8."
            )
        if self._encoder is None:
            raise ValueError(
                "True blocks come before generated ones, in the session that was started with their image: "
                "start another session and prefill it first."
            )
        for frames, stretch in zip(video.split(self.frames), actions.split(self.frames), strict=True):
            place = self._place()
            latents, encoder = self._encoded(frames, self._encoder)
            self._commit_true(latents, _owned(stretch), before=place)
            self._encoder = encoder

    def step(self, actions: Tensor, *, prompt: str | None = None) -> Tensor:
        """Generate the next block: actions (f, 13) of `frames` frames -> uint8 (f, h, w, 3) on the CPU.

        prompt: From here on; by default it stays.

        Raises:
            ValueError: If the actions don't fit, or the horizon is reached. Nothing has changed then.
        """
        self._check(actions, blocks=1)
        if prompt is not None:
            self.prompt = prompt
        place, standing = self._place(), copy.copy(self.rollout)
        actions = _owned(actions)
        try:
            self.block = self.rollout.step(actions[None], text=self.text)
        except BaseException:
            self.rollout = standing  # it had walked on; nothing was committed
            raise
        self._encoder = None
        return self._note(actions, self.rollout.context, latents=self.block.latents, before=place)

    def undo(self, blocks: int = 1) -> None:
        """Take back the last blocks, from copies of the memory: exact at any time. The prompt stays.

        Raises:
            ValueError: If copies don't go back that far.
        """
        if not 1 <= blocks <= len(self._copies):
            raise ValueError(
                f"undo({blocks}) must be of 1 to {len(self._copies)} blocks, which is what is kept "
                f"(undo_seconds={self._undo_seconds:g}); restore a snapshot, or start with more undo_seconds."
            )
        for _ in range(blocks):
            place = self._copies.pop()
        self.rollout, self._encoder, self._decoder, self.shown = place
        self.block = None
        del self._log[-blocks:]
        del self._kept[len(self._log) :]
        self._true = min(self._true, len(self._log))

    # -- snapshots -------------------------------------------------------------------------------------------

    @property
    def played(self) -> str:
        """Memory and steps, in words: the same student may be played with others."""
        return f"{self.rollout.memory.plan.policy}, {self.rollout.sampler}"

    def snapshot(self) -> Snapshot:
        """Return what this session can be computed again from; see `restore`."""
        return Snapshot(
            world=self.world,
            played=self.played,
            seed=self._seed,
            true_blocks=self._true,
            prompts=tuple(prompt for _, prompt in self._log),
            actions=torch.cat([actions for actions, _ in self._log]),
            latents=torch.cat(self._kept),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go to where a snapshot was taken, by committing its latents again, a pass a block.

        The result is exact to the last bit, on the same kind of device. Latents are kept of true blocks
        and up to the first eviction; blocks of an endless world that came later are generated again, which is
        as exact and takes as long as playing them did.

        Raises:
            ValueError: If it is of another world, or one played otherwise, or does not fit. Nothing has
                changed then.
        """
        kept = self._check_snapshot(snapshot)
        self._begin(snapshot.seed, prompt=snapshot.prompts[0])
        for index, prompt in enumerate(snapshot.prompts):
            self.prompt = prompt
            end = 1 + index * self.frames
            stretch = _owned(snapshot.actions[max(0, end - self.frames) : end])
            if index >= kept:
                self.step(stretch)
                continue
            at = self.rollout.memory.plan.block(index)
            latents = snapshot.latents[None, at.start : at.stop].clone().to(self.rollout.memory.device)
            if index < snapshot.true_blocks:
                self._commit_true(latents, stretch, before=self._place() if index else None)
                continue
            place = self._place()
            self.block = self.rollout.again(latents, stretch[None], text=self.text)
            self._note(stretch, latents, latents=self.block.latents, before=place)

    # -- parts -----------------------------------------------------------------------------------------------

    def _begin(self, seed: int, *, prompt: str) -> None:
        """Stand before the image, with nothing committed."""
        self.rollout = self._rollout_of(seed)
        if self.rollout.memory.batch != 1:
            raise ValueError(f"A session is one stream; the memory holds {self.rollout.memory.batch}.")
        self.prompt, self._seed = prompt, seed
        self.block = self._encoder = self._decoder = None
        self.shown = torch.empty(0, dtype=torch.uint8)
        self._words = (prompt, self._read(prompt))
        self._true, self._log, self._kept = 0, [], []
        self._copies = deque(maxlen=math.ceil(self._undo_seconds * self.fps / self.frames))

    def _commit_true(self, latents: Tensor, actions: Tensor, *, before: _Place | None = None) -> None:
        """Commit a block that is given. latents: (1, t, c, h, w); actions: (f, 13)."""
        self.rollout.prefill(latents, actions[None], text=self.text)
        self._true += 1
        self._note(actions, latents, latents=latents, before=before)

    def _note(self, actions: Tensor, kept: Tensor, *, latents: Tensor, before: _Place | None) -> Tensor:
        """Log a block that was committed; return its frames. kept: (1, t, c, h, w) to commit it again."""
        if before is not None and self._copies.maxlen:
            self._copies.append(before)
        if len(self._kept) == len(self._log) and self._keeps(self.rollout.memory.latents):
            self._kept.append(kept[0].cpu())
        self._log.append((actions, self.prompt))
        with torch.no_grad():
            video, self._decoder = self._vae.decode_stream(latents, self._decoder)
        frames = to_uint8(video)[0].cpu()
        self.shown = frames[-1]
        return frames

    def _keeps(self, latents: int) -> bool:
        """Whether a snapshot keeps latents so far: true blocks always, others until a latent is given up."""
        plan = self.rollout.memory.plan
        bound = plan.num_latents or (plan.policy.span or 0) + (plan.policy.room or 0)
        return self._true > len(self._log) or latents <= bound

    def _place(self) -> _Place:
        """Return where the session stands, with a copy of the memory if copies are kept."""
        rollout = self.rollout.fork() if self._copies.maxlen else self.rollout
        return _Place(rollout, self._encoder, self._decoder, self.shown)

    @torch.no_grad()
    def _encoded(self, video: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Encode uint8 (f, h, w, 3) -> (1, t, c, h', w')."""
        pixels = from_uint8(rearrange(video, "f h w c -> 1 f c h w").to(self.rollout.memory.device))
        return self._vae.encode_stream(pixels, state)

    def _check(self, actions: Tensor, *, blocks: int) -> None:
        size = (blocks * self.frames, len(CHANNELS))
        if actions.shape != size:
            raise ValueError(
                f"actions are {tuple(actions.shape)}; {blocks} block(s) of {self.frames} frames take {size}."
            )
        if not actions.isfinite().all():
            raise ValueError("actions hold NaN or infinity; they must be d̄ and degrees a frame.")
        left = self.blocks_left
        if left is not None and blocks > left:
            plan = self.rollout.memory.plan
            raise ValueError(
                f"{blocks} more block(s) of {self.frames} frames don't fit: the horizon of this world is "
                f"{plan.num_latents} latents, of which {self.rollout.memory.latents} are committed. Start "
                "again, or export the world with max_latents, which bounds its memory and makes it endless."
            )

    def _check_snapshot(self, snapshot: Snapshot) -> int:
        """Return how many blocks a snapshot keeps the latents of."""
        if snapshot.world != self.world:
            raise ValueError(
                f"The snapshot is of a world with student {snapshot.world[:12] or '(unnamed)'}..., this one "
                f"has {self.world[:12] or '(unnamed)'}...; load the world it was taken in."
            )
        if snapshot.played != self.played:
            raise ValueError(
                f"The snapshot was taken where {snapshot.played} was played, here {self.played} is; load the "
                "world that it was taken in."
            )
        plan = self.rollout.memory.plan
        blocks, latents = len(snapshot.prompts), snapshot.latents
        frames = 1 + (blocks - 1) * self.frames
        kept = plan.blocks_in(len(latents))
        fits = (
            snapshot.actions.shape == (frames, len(CHANNELS)) and 1 <= snapshot.true_blocks <= kept <= blocks
        )
        fits = fits and latents[:1].shape == self._kept[0].shape
        if not fits:
            raise ValueError(
                f"The snapshot holds {blocks} prompts, actions {tuple(snapshot.actions.shape)}, latents "
                f"{tuple(latents.shape)} and {snapshot.true_blocks} true blocks; {blocks} blocks here take "
                f"{frames} frames of actions and latents of {tuple(self._kept[0].shape[1:])}."
            )
        return kept


def _owned(actions: Tensor) -> Tensor:
    """Return a copy of actions: matrix products on a CPU may round by where in memory their input begins."""
    return actions.to("cpu", torch.float32, copy=True).contiguous()
