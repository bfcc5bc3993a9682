"""What callbacks that score generated clips share: when, which rank, for how long, and what is logged."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from relic.callbacks.panel import add_picture, gif_bytes, side_by_side
from relic.callbacks.recordings import Recordings, clips_of
from relic.callbacks.undisturbed import undisturbed
from relic.metrics.pose.estimator import PoseEstimator
from relic.metrics.pose.visual_odometry import VisualOdometry
from relic.metrics.similarity import check_video
from relic.ops.camera import check_rigid
from relic.types import Clip

__all__ = ["Generated", "Scoring"]


class Generated(NamedTuple):
    """A clip, what was made of it, uint8 (f, h, w, 3), and how many of its frames were true."""

    number: int
    clip: Clip
    video: Tensor
    prefix_frames: int


class Scoring(Callback, ABC):
    """Generate clips after validation, score them, and log the scores.

    The first validation is scored, then every n-th; the others log the last scores again, so that
    `ModelCheckpoint(monitor=...)` finds them. Ranks share the clips, one each at a time, and generate equally
    often: one that has no clip left generates the first again and does not score it. Generators and modes are
    left as they were. Validation by steps is the trainer's `val_check_interval`.

    Args:
        clips: A data set of recordings, or clips. With several ranks, of one length.
        every_n_validations: Score after the first validation and every n-th from there.
        max_seconds: No further clips are generated after so long; all ranks stop together. `<name>/clips`
            is logged: how many were scored, always the first ones.
        shown: So many clips of the first rank go to TensorBoard (image tab): truth, sample, and the camera's
            path.
        estimator: Finds cameras in videos; None for `VisualOdometry`.
        seed: Seed of the noise.
    """

    name: str  # of the group of scores

    def __init__(
        self,
        clips: Recordings | Sequence[Clip],
        *,
        every_n_validations: int = 1,
        max_seconds: float | None = None,
        shown: int = 2,
        estimator: PoseEstimator | None = None,
        seed: int = 0,
    ) -> None:
        if every_n_validations < 1:
            raise ValueError(f"every_n_validations={every_n_validations} must be at least 1.")
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"max_seconds={max_seconds} must be positive; None sets no limit.")
        if shown < 0:
            raise ValueError(f"shown={shown} must not be negative.")
        self.source = clips
        self.every_n_validations, self.max_seconds = every_n_validations, max_seconds
        self.shown, self.seed = shown, seed
        self.estimator = estimator or VisualOdometry()
        self.clips: list[Clip] = []
        self.validations = 0
        self.latest: dict[str, float] = {}
        self._true_cameras: dict[int, Tensor] = {}

    # -- of a kind -------------------------------------------------------------------------------------------

    @abstractmethod
    def metric(self, pl_module: LightningModule) -> Metric:
        """Return an empty metric whose `compute` names every score."""

    @abstractmethod
    def add(self, metric: Any, made: Generated) -> None:
        """Add a generated clip to the metric."""

    @abstractmethod
    def prefix_frames(self, clip: Clip, pl_module: LightningModule) -> int:
        """Return how many true frames a clip starts from."""

    def show_scores(self, writer: Any, *, step: int) -> None:
        """Add pictures of the latest scores to a TensorBoard SummaryWriter."""

    # -- when ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.clips or stage == "predict":
            return
        clips = clips_of(self.source, pl_module)
        lengths = sorted({len(clip.video) for clip in clips})
        if trainer.world_size > 1 and len(lengths) > 1:
            raise ValueError(
                f"The clips have {lengths} frames; with {trainer.world_size} ranks they must be of one "
                "length, or the passes of a sharded network would not match."
            )
        for number, clip in enumerate(clips):
            check_video(clip.video, name=f"clip {number}: video")
            if len(clip.c2w) != len(clip.video):
                raise ValueError(
                    f"clip {number} has {len(clip.video)} frames and {len(clip.c2w)} poses; it needs a pose "
                    "for every frame."
                )
            check_rigid(clip.c2w, name=f"clip {number}: c2w")
        self.clips = clips

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            raise ValueError(
                f"{type(self).__name__} scores after validations, and this run has none: give the module a "
                "validation_step and data for it, and leave limit_val_batches above 0."
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        due = not fitting or self.validations % self.every_n_validations == 0
        self.validations += fitting
        if due:
            with undisturbed(pl_module):
                self.latest = self.score(trainer, pl_module)
        for name, value in self.latest.items():
            pl_module.log(name, value, sync_dist=True)  # equal on all ranks already

    on_test_epoch_end = on_validation_epoch_end

    # -- what ------------------------------------------------------------------------------------------------

    def score(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Generate and score the clips; return the scores, the same on all ranks."""
        metric = self.metric(pl_module).to(pl_module.device)
        ranks, rank, start = trainer.world_size, trainer.global_rank, time.monotonic()
        rounds, done = -(-len(self.clips) // ranks), 0
        for turn in range(rounds):
            if turn and self.max_seconds is not None:
                over = trainer.strategy.broadcast(time.monotonic() - start > self.max_seconds)
                if over:
                    spent = f"{done} of {len(self.clips)} clips in {self.max_seconds:g} s"
                    rank_zero_info(f"{type(self).__name__}: {spent}.")
                    break
            number = turn * ranks + rank
            made = self.generate(trainer, pl_module, number if number < len(self.clips) else 0)
            done = min((turn + 1) * ranks, len(self.clips))
            if number < len(self.clips):
                self.add(metric, made)
                if turn < self.shown:
                    self._show(trainer, made)
        with warnings.catch_warnings():  # a rank may have had no clip
            warnings.filterwarnings("ignore", message=".*compute.* before the .*update")
            scores = {name: float(value) for name, value in metric.compute().items()}
        scores[f"{self.name}/clips"] = float(done)
        self.latest = scores
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
                self.show_scores(logger.experiment, step=trainer.global_step)
        return scores

    def generate(self, trainer: Trainer, pl_module: LightningModule, number: int) -> Generated:
        """Return what the module makes of a clip.

        Raises:
            ValueError: If that is not one uint8 video of the clip's shape.
        """
        clip = self.clips[number]
        prefix = self.prefix_frames(clip, pl_module)
        with trainer.precision_plugin.forward_context():
            given = pl_module.generate([clip], prefix_frames=prefix, seed=self.seed)  # type: ignore[operator]
        videos = list(given) if isinstance(given, (Sequence, Tensor)) else [given]
        if [(getattr(v, "shape", None), getattr(v, "dtype", None)) for v in videos] != [
            (clip.video.shape, torch.uint8)
        ]:
            found = ", ".join(_described(video) for video in videos) or "nothing"
            raise ValueError(
                f"generate of {type(pl_module).__name__} gave {found} for one clip of "
                f"{tuple(clip.video.shape)}; it must give one uint8 video (f, h, w, 3) a clip, of the clip's "
                "length and size."
            )
        return Generated(number, clip, videos[0].cpu(), prefix)

    def cameras(self, made: Generated) -> Tensor:
        """Return the camera (f, 4, 4) found in a generated video, NaN where none is found."""
        return self.estimator.estimate(made.video, intrinsics_px=made.clip.intrinsics_px).c2w

    def true_cameras(self, made: Generated) -> Tensor:
        """Return the camera that the same estimator finds in the true video."""
        if made.number not in self._true_cameras:
            self._true_cameras[made.number] = self.cameras(made._replace(video=made.clip.video))
        return self._true_cameras[made.number]

    def _show(self, trainer: Trainer, made: Generated) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards or not trainer.is_global_zero:
            return
        panel = gif_bytes(side_by_side(made.clip.video, made.video, made.clip.c2w), fps=made.clip.fps)
        for logger in boards:
            tag = f"{self.name}/clip-{made.number}"
            add_picture(logger.experiment, tag, panel, step=trainer.global_step)

    # -- resuming --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations, "latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations, self.latest = state_dict["validations"], dict(state_dict["latest"])


def _described(given: object) -> str:
    return f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
