"""What is measured of generated video: functions and torchmetrics. Importing it loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relic.metrics.pose import (
        PoseEstimate,
        PoseEstimator,
        PoseFiles,
        Pycolmap,
        VisualOdometry,
        anchor_to,
    )
    from relic.metrics.trajectory_error import (
        ActionError,
        StepErrors,
        TooFewSteps,
        absolute_trajectory_error,
        action_buckets,
        align,
        estimator_floor,
        mind_errors,
        relative_pose_error,
    )

__all__ = [
    "ActionError",
    "PoseEstimate",
    "PoseEstimator",
    "PoseFiles",
    "Pycolmap",
    "StepErrors",
    "TooFewSteps",
    "VisualOdometry",
    "absolute_trajectory_error",
    "action_buckets",
    "align",
    "anchor_to",
    "estimator_floor",
    "mind_errors",
    "relative_pose_error",
]

# names are looked up when used, so that importing this package loads nothing
_HOMES = {
    "ActionError": "trajectory_error",
    "PoseEstimate": "pose",
    "PoseEstimator": "pose",
    "PoseFiles": "pose",
    "Pycolmap": "pose",
    "StepErrors": "trajectory_error",
    "TooFewSteps": "trajectory_error",
    "VisualOdometry": "pose",
    "absolute_trajectory_error": "trajectory_error",
    "action_buckets": "trajectory_error",
    "align": "trajectory_error",
    "anchor_to": "pose",
    "estimator_floor": "trajectory_error",
    "mind_errors": "trajectory_error",
    "relative_pose_error": "trajectory_error",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
