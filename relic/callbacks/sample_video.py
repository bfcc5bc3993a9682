"""Sample videos during training and show them beside the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from relic.callbacks.panel import gif_bytes, side_by_side
from relic.data.clips import read_clips
from relic.data.video import encode_video
from relic.types import Clip

__all__ = ["SampleVideo"]


class SampleVideo(Callback):
    """Generate a few clips after validation: truth, sample and the camera's path, side by side.

    Videos go to TensorBoard (image tab, animated) and to
    `<default_root_dir>/samples/step-XXXXXXXX/clip-K.mp4`. Every rank generates every clip, since all of them
    together make the passes of a sharded network; the first one shows them.

    Args:
        root: Folder of the rendered (not encoded) data set.
        num_frames: Frames per clip, 4k+1.
        split: Which scenes: `train`, `validation` or `evaluation`.
        num_clips: Number of clips.
        validation_scenes: Scenes held out for validation, as in the data module.
        evaluation_scenes: Scenes held out for evaluation, as in the data module.
        every_n_validations: Sample after every n-th validation only.
        seed: Seed of the windows and of the noise.
    """

    def __init__(
        self,
        root: str,
        num_frames: int,
        *,
        split: Literal["train", "validation", "evaluation"] = "validation",
        num_clips: int = 2,
        validation_scenes: int = 2,
        evaluation_scenes: int = 2,
        every_n_validations: int = 1,
        seed: int = 0,
    ) -> None:
        if every_n_validations < 1:
            raise ValueError(f"every_n_validations={every_n_validations} must be at least 1.")
        self.every_n_validations = every_n_validations
        self.seed = seed
        self.validations = 0
        self.source: dict[str, Any] = {
            "root": root, "num_frames": num_frames, "split": split, "num_clips": num_clips, "seed": seed,
            "validation_scenes": validation_scenes, "evaluation_scenes": evaluation_scenes,
        }  # fmt: skip
        self.clips: list[Clip] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "generate"):
            name = type(pl_module).__name__
            raise TypeError(
                f"SampleVideo needs a module with generate(clips, prefix_frames=, seed=); {name} has none."
            )
        if not self.clips:
            clip = getattr(pl_module, "clip", None)  # a foreign module without one takes clips as stored
            self.clips = read_clips(**self.source, clip=clip)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validations += 1
        if self.validations % self.every_n_validations == 0:
            self.sample(trainer, pl_module)

    def sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate the clips and show them."""
        with torch.no_grad():
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
                add_gif(
                    logger.experiment, f"sample/{name}", gif_bytes(video, fps=fps), step=trainer.global_step
                )

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]


def add_gif(writer: Any, tag: str, gif: bytes, *, step: int) -> None:
    """Add an encoded GIF to a TensorBoard SummaryWriter (whose own add_video wants moviepy)."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(encoded_image_string=gif)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
