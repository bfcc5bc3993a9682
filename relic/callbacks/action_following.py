"""Does the model obey? The camera of generated clips against the commanded one, while it trains."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule
from torchmetrics import Metric

from relic.callbacks.scoring import Generated, Scoring
from relic.metrics.trajectory_error import ActionError
from relic.types import Clip

__all__ = ["ActionFollowing"]


class ActionFollowing(Scoring):
    """Score how the camera of generated clips follows the commanded path, from the image alone
    (`ActionError`).

    Logs `action/rpe_trans`, `action/rpe_rot_deg`, the same over 8 frames (`…_8`), `action/ate` and
    `action/coverage`, by action where there are enough, and each with a `_floor`: what the same estimator
    finds in the true video. Translations are in d̄. Arguments are those of `Scoring`.
    """

    name = "action"

    def metric(self, pl_module: LightningModule) -> Metric:
        return ActionError()

    def prefix_frames(self, clip: Clip, pl_module: LightningModule) -> int:
        return 1

    def add(self, metric: Any, made: Generated) -> None:
        clip, floor = made.clip, self.true_cameras(made)
        metric.update(self.cameras(made), clip.c2w, floor=floor, d_bar=clip.d_bar)
