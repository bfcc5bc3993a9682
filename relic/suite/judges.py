"""What the videos of a run are scored with."""

from __future__ import annotations

from dataclasses import dataclass

from relic.metrics.pose.estimator import PoseEstimator
from relic.metrics.revisit import RevisitRule
from relic.metrics.similarity import LPIPS

__all__ = ["Judges"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Judges:
    """What videos are scored with.

    Args:
        rule: What counts as a revisit.
        lpips: None where its backbone is missing; a report says so.
        estimator: Finds the camera of a video; None leaves out motion, and whether cameras returned.
    """

    rule: RevisitRule
    lpips: LPIPS | None
    estimator: PoseEstimator | None
