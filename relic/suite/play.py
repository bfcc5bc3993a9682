"""Play a case: a true prefix is committed, the rest is generated block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from relic.ops.actions import encode_actions
from relic.ops.video import from_uint8, to_uint8
from relic.session import Codec
from relic.types import Clip
from relic.world import World

__all__ = ["Contestant", "play", "reconstruct", "why_not"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Contestant:
    """A world with the memory it is played with.

    Args:
        label: What tables call it; no two of a run share one.
        world: The bundle, its policy replaced if another was asked for.
        files: Hash of all of the bundle's files, empty if it comes from none.
    """

    label: str
    world: World
    files: str = ""

    @property
    def block_frames(self) -> int:
        """Frames of a block."""
        return 4 * self.world.config.clip.block_latents

    @cached_property
    def autoencoder(self) -> str:
        """Hash of the autoencoder's weights: worlds that share it show the truth through it alike."""
        found = hashlib.sha256()
        for name, value in sorted(self.world.vae.state_dict().items()):
            found.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def why_not(world: World, *, num_frames: int) -> str | None:
    """Return why a world cannot play so many frames, None if it can."""
    clip = world.config.clip
    if (num_frames - 1) % (4 * clip.block_latents):
        return f"{num_frames} frames are not the image and whole blocks of {4 * clip.block_latents}"
    if not world.endless and num_frames > clip.max_frames:
        return f"{num_frames} frames are beyond the horizon of this world, {clip.max_frames}"
    return None


def play(
    world: World,
    truth: Clip,
    *,
    prefix: int,
    seed: int,
    progress: Callable[[int], object] = lambda frames: None,
) -> Tensor:
    """Generate a clip from its true first frames and its actions -> uint8 (f, h, w, 3), the prefix as it is.

    Actions are the clip's poses in units of its `d_bar`. The prompt is the caption of the first segment,
    throughout.

    Args:
        world: What is played.
        truth: The clip; no picture after `prefix` is looked at.
        prefix: True frames: the image and whole blocks.
        seed: Seed of the noise.
        progress: Told the frames of each block.
    """
    prompt = truth.captions[0] if truth.captions else ""
    session = world.start(truth.video[0], prompt, seed=seed, undo_seconds=0)
    steer = encode_actions(truth.c2w, d_bar=truth.d_bar).float()
    if prefix > 1:
        session.prefill(truth.video[1:prefix], steer[1:prefix])
    frames = [truth.video[:prefix]]
    for stretch in steer[prefix:].split(session.frames):
        frames.append(session.step(stretch))
        progress(len(stretch))
    return torch.cat(frames)


@torch.no_grad()
def reconstruct(
    vae: Codec, video: Tensor, *, block_frames: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Pass a video (f, h, w, 3) uint8 through the autoencoder, in the stretches that a session takes."""
    encoder = decoder = None
    shown = []
    for stretch in (video[:1], *video[1:].split(block_frames)):
        pixels = from_uint8(rearrange(stretch, "f h w c -> 1 f c h w").to(device))
        latents, encoder = vae.encode_stream(pixels, encoder)
        decoded, decoder = vae.decode_stream(latents, decoder)
        shown.append(to_uint8(decoded)[0].cpu())
    return torch.cat(shown)
