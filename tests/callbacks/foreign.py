"""A module that knows nothing of relic but `generate`, clips that leave and come back, and a known camera."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning import LightningModule
from torch import Tensor

from relic.metrics.pose.estimator import PoseEstimate
from relic.ops.actions import integrate, parse_script
from relic.types import Clip

OUT, BACK = "pan_left*28", "pan_right*28"
PREFIX, FRAMES = 29, 57


def clip_of(seed: int, *, frames: int = FRAMES) -> Clip:
    """Return noise seen by a camera that turns away and back: equal poses show equal pictures."""
    c2w = integrate(parse_script(f"{OUT} {BACK}")[:frames], d_bar=0.1)
    draw = torch.Generator().manual_seed(seed)
    out = torch.randint(0, 256, (PREFIX, 64, 64, 3), dtype=torch.uint8, generator=draw)
    video = torch.cat([out, out[:-1].flip(0)])[:frames]
    return Clip(video, c2w, torch.tensor([50.0, 50.0, 31.5, 31.5], dtype=torch.float64), 16.0, 0.1)


class Known:
    """Finds the camera that was commanded in any video."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.c2w, self.asked = clips[0].c2w, 0

    def estimate(self, video: Tensor, *, intrinsics_px: Tensor) -> PoseEstimate:
        self.asked += 1
        return PoseEstimate(self.c2w[: len(video)], torch.ones(len(video), dtype=torch.bool))


class Foreign(LightningModule):
    """Darkens the truth behind the prefix by `loss` grey levels, which training lowers."""

    longest_prefix = 10_000

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.asked: list[tuple[int, int]] = []
        self.loss = 40

    def generate(self, clips, *, prefix_frames=1, seed):
        if prefix_frames > self.longest_prefix:
            raise NotImplementedError(f"prefix_frames={prefix_frames}: this module takes an image.")
        self.asked.append((prefix_frames, seed))
        torch.rand(3)  # global randomness, as a foreign module may use
        return [self.spoiled(clip, prefix_frames) for clip in clips]

    def spoiled(self, clip: Clip, prefix_frames: int) -> Tensor:
        dark = (clip.video.int() - self.loss).clamp(min=0).to(torch.uint8)
        return torch.cat([clip.video[:prefix_frames], dark[prefix_frames:]])

    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(1, 1)).sum()

    def on_train_epoch_end(self):
        self.loss = max(0, self.loss - 10)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(2))

    val_dataloader = train_dataloader
