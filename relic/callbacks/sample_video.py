"""Sample videos during training and show them beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from relic.callbacks.panel import add_picture, gif_bytes, side_by_side
from relic.callbacks.recordings import Recordings, clips_of
from relic.callbacks.undisturbed import undisturbed
from relic.data.video import encode_video
from relic.types import Clip

__all__ = ["SampleVideo"]


class SampleVideo(Callback):
    """Generate a few clips after validation: truth, sample and the camera's path, side by side.

    Videos go to TensorBoard (image tab, animated) and to
    `<default_root_dir>/samples/step-XXXXXXXX/clip-K.mp4`. Every rank generates every clip, since all of them
    together make the passes of a sharded network; the first one shows them.

    Args:
        clips: A data set of recordings, or clips.
        every_n_validations: Sample after every n-th validation only.
        seed: Seed of the noise.
    """

    def __init__(
        self, clips: Recordings | Sequence[Clip], *, every_n_validations: int = 1, seed: int = 0
    ) -> None:
        if every_n_validations < 1:
            raise ValueError(f"every_n_validations={every_n_validations} must be at least 1.")
        self.every_n_validations = every_n_validations
        self.seed = seed
        self.validations = 0
        self.source = clips
        self.clips: list[Clip] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.clips:
            self.clips = clips_of(self.source, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validations += 1
        if self.validations % self.every_n_validations == 0:
            self.sample(trainer, pl_module)

    def sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate the clips and show them."""
        with undisturbed(pl_module), trainer.precision_plugin.forward_context():
            samples = pl_module.generate(self.clips, seed=self.seed)  # type: ignore[operator]
        if not trainer.is_global_zero:
            return
        for index, (clip, video) in enumerate(zip(self.clips, samples, strict=True)):
            self.show(trainer, side_by_side(clip.video, video, clip.c2w), name=f"clip-{index}", fps=clip.fps)

    def show(self, trainer: Trainer, video: Tensor, *, name: str, fps: float) -> None:
        """Write one video to the samples folder and to TensorBoard."""
        folder = Path(trainer.default_root_dir) / "samples" / f"step-{trainer.global_step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        even = video[:, :, : video.shape[2] // 2 * 2]
        (folder / f"{name}.mp4").write_bytes(encode_video(even.numpy(), fps=fps)[0])
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                add_picture(
                    logger.experiment, f"sample/{name}", gif_bytes(video, fps=fps), step=trainer.global_step
                )

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]
