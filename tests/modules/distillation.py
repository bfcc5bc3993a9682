"""A nano student, its teacher's file and batches to roll out, for tests of self-forcing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from relic.modules import SelfForcing
from relic.nn.checkpoints import WeightsSource, save_weights
from relic.nn.denoiser import Denoiser
from relic.nn.student import FewSteps, StudentConfig
from relic.ops.randomness import derive_seed, keyed_generator
from relic.ops.retention import Compressed
from relic.ops.words import word_ids
from relic.types import Batch, ClipSpec
from tests.worlds import NANO, NANO_WORDS

CLIP = ClipSpec(height=32, width=48, horizons=(17,), block_latents=2)  # the image and two blocks
POLICY = Compressed(window=2, schedule=(1, 2))
SAMPLER = FewSteps(steps=2)
STUDENT = StudentConfig(net=NANO, words=NANO_WORDS, clip=CLIP, policy=POLICY, sampler=SAMPLER)


def network(seed: int, *, config: StudentConfig = STUDENT) -> Denoiser:
    """A network whose outputs are not zero, as those of a fresh one are."""
    net = config.build()
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return net


def write_files(
    folder: Path, *, config: StudentConfig = STUDENT, prefix_share: float = 0.0
) -> dict[str, WeightsSource]:
    """Write a teacher, as if fitted with prefixes or not, and a student, and return them as the arguments
    `teacher` and `init`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = {
        "dit": dataclasses.asdict(config.net),
        "words": dataclasses.asdict(config.words) if config.words else None,
        "clip": dataclasses.asdict(config.clip),
        "sampler": {},
        "prefix_share": prefix_share,
    }
    teacher, student = folder / "teacher.safetensors", folder / "student.safetensors"
    save_weights(teacher, network(1, config=config).state_dict(), kind="teacher", config=header)
    save_weights(student, network(2, config=config).state_dict(), kind="student", config=config.to_header())
    return {"teacher": WeightsSource(path=str(teacher)), "init": WeightsSource(path=str(student))}


def self_forcing(files: dict[str, WeightsSource], **changes: Any) -> SelfForcing:
    settings: dict[str, Any] = {
        "net": NANO, "clip": CLIP, "words": NANO_WORDS, "policy": POLICY, "sampler": SAMPLER, **files,
        "critic_ratio": 2, "critic_only_steps": 1, "ema_decay": 0.5,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.0, 0.999)),
        "critic_optimizer": lambda p: torch.optim.AdamW(p, lr=2e-3, betas=(0.0, 0.999)), **changes,
    }  # fmt: skip
    return SelfForcing(**settings)


def batch(indices: list[int], *, clip: ClipSpec = CLIP) -> Batch:
    """A batch to roll out; of its latents the first is read."""
    draws = [keyed_generator("distillation", i) for i in indices]
    size = (1 + (clip.max_frames - 1) // 4, 4, clip.latent_height, clip.latent_width)
    actions = torch.stack([torch.rand(clip.max_frames, 13, generator=g) for g in draws])
    actions[:, 0] = 0
    return Batch(
        latents=torch.stack([torch.randn(size, generator=g) for g in draws]), trajectory=None, video=None,
        actions=actions, text=torch.stack([word_ids("a red room", length=6) for _ in indices]),
        d_bar=torch.ones(len(indices), dtype=torch.float64),
        key=torch.tensor([derive_seed("distillation", i) for i in indices]),
    )  # fmt: skip


class Rollouts(lightning.LightningDataModule):
    """Batches 2 samples wide over all ranks, from the `start`-th on."""

    def __init__(self, *, batches: int = 12, start: int = 0, global_batch: int = 2) -> None:
        super().__init__()
        self.batches, self.start, self.global_batch = batches, start, global_batch

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        starts = (self.global_batch * i for i in range(self.start, self.start + self.batches))
        rows = [batch(list(range(s + rank, s + self.global_batch, world))) for s in starts]
        return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
