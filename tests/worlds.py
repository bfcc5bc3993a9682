"""Small worlds for tests: random batches with smooth camera motion, no files."""

from __future__ import annotations

from dataclasses import replace

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from relic.nn.control import ControlConfig
from relic.nn.dit import DiTConfig
from relic.nn.text import WordTableConfig
from relic.ops.randomness import derive_seed, keyed_generator
from relic.ops.words import word_ids
from relic.types import Batch, ClipSpec

NANO = DiTConfig(
    width=32,
    depth=2,
    heads=2,
    ffn=64,
    latent_channels=4,
    text_width=8,
    text_length=6,
    control=ControlConfig(width=8),
)
RAYED = replace(NANO, control=ControlConfig(width=8, rays=0.75, inverse_depths=(0.1, 0.0)))
NANO_WORDS = WordTableConfig(width=8)
NANO_CLIP = ClipSpec(height=32, width=48, horizons=(9,), block_latents=2)


def sample(seed: int, index: int, *, channels: int = 4) -> tuple[Tensor, Tensor]:
    """Latents (t, c, h, w) that pan with the action, and actions (f, 13)."""
    generator = keyed_generator("world", seed, index)
    speed = float(torch.rand((), generator=generator))
    actions = torch.zeros(9, 13)
    actions[1:, 9] = speed
    place = torch.randn(channels, 4, 6, generator=generator)
    latents = torch.stack([place * (1 + speed * t) for t in range(3)])
    return latents, actions


def batch(indices: list[int], *, seed: int = 0) -> Batch:
    """A batch of latents; every sample is a function of (seed, index)."""
    latents, actions = zip(*(sample(seed, i) for i in indices), strict=True)
    text = torch.stack([word_ids("a red room", length=6) for _ in indices])
    return Batch(
        latents=torch.stack(latents),
        trajectory=None,
        video=None,
        actions=torch.stack(actions),
        text=text,
        d_bar=torch.ones(len(indices), dtype=torch.float64),
        key=torch.tensor([derive_seed(seed, i) for i in indices]),
    )


class LatentWorld(lightning.LightningDataModule):
    """A foreign data module: all it has to do is yield `Batch`. A rank takes a strided slice of each."""

    def __init__(self, *, global_batch: int = 4, batches: int = 10) -> None:
        super().__init__()
        self.global_batch, self.batches = global_batch, batches

    def batches_from(self, offset: int, count: int) -> DataLoader[Batch]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        starts = range(offset, offset + count * self.global_batch, self.global_batch)
        rows = [batch(list(range(s + rank, s + self.global_batch, world))) for s in starts]
        return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Batch]:
        return self.batches_from(0, self.batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.batches_from(10_000, 2)
