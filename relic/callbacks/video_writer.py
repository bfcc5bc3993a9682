"""Write what `relic predict` samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from relic.data.video import encode_video
from relic.types import Batch

__all__ = ["VideoWriter"]


class VideoWriter(BasePredictionWriter):
    """Write each predicted video to `<default_root_dir>/predictions/<key>.mp4`.

    Args:
        fps: Frames a second.
    """

    def __init__(self, fps: int = 16) -> None:
        super().__init__(write_interval="batch")
        self.fps = fps
        self.count = 0
        self.folder = Path("predictions")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.folder = Path(trainer.default_root_dir) / "predictions"

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for key, video in zip(batch.key.tolist(), prediction, strict=True):
            (self.folder / f"{key:019d}.mp4").write_bytes(encode_video(video.numpy(), fps=self.fps)[0])
            self.count += 1
