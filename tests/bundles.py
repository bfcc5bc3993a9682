"""Small worlds to play, with random weights, all of which matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from relic.nn.checkpoints import save_weights
from relic.nn.student import FewSteps, StudentConfig
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig
from relic.ops.actions import parse_script
from relic.ops.retention import AnyPolicy, Compressed
from relic.types import ClipSpec
from relic.world import World
from tests.worlds import NANO, NANO_WORDS

CLIP = ClipSpec(height=32, width=48, horizons=(41,), block_latents=2)  # 11 latents: the image and 5 blocks
FRAMES = 8  # of a block
SHORT = Compressed(window=4, schedule=(1, 2))
BOUNDED = Compressed(window=4, schedule=(1, 2), max_latents=7)
ACTIONS = parse_script("dolly_in*8 pan_left*8 dolly_in+truck_left*8 tilt_up*4 static*4 pan_right*8").float()


def config_of(policy: AnyPolicy = SHORT, **sampler: object) -> StudentConfig:
    steps = {"steps": 2, **sampler}
    return StudentConfig(net=NANO, words=NANO_WORDS, clip=CLIP, policy=policy, sampler=FewSteps(**steps))


def randomised(net: torch.nn.Module, *, seed: int, std: float) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return net.requires_grad_(False).eval()


def vae_of(*, channels: int = 4) -> TinyVAE:
    sizes = {"patch": 4, "widths": (8, 8), "encoder_depths": (1, 1), "decoder_depths": (1, 1)}
    return randomised(TinyVAE(TinyVAEConfig(latent_channels=channels, **sizes)), seed=1, std=0.1)


def world_of(policy: AnyPolicy = SHORT, **sampler: object) -> World:
    config = config_of(policy, **sampler)
    net = randomised(config.build(), seed=0, std=0.15)
    return World(net=net, vae=vae_of(), config=config, d_bar=0.25, name="a nano world")


def image_of(seed: int = 0, *, frames: int | None = None) -> Tensor:
    """A picture (h, w, 3) uint8 of random colours, or that many of them."""
    size = (CLIP.height, CLIP.width, 3) if frames is None else (frames, CLIP.height, CLIP.width, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write_files(root: Path, policy: AnyPolicy = SHORT, *, channels: int = 4) -> tuple[str, str]:
    """Write a student and an autoencoder as stages export them; return their paths."""
    root.mkdir(parents=True, exist_ok=True)
    world = world_of(policy)
    student, vae = root / "student.safetensors", root / "tiny_vae.safetensors"
    save_weights(student, world.net.state_dict(), kind="student", config=world.config.to_header())
    vae_of(channels=channels).save(vae)
    return str(student), str(vae)


def other_clip(config: StudentConfig) -> StudentConfig:
    return replace(config, clip=replace(config.clip, fps=8))
