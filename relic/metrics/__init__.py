"""What is measured of generated video: functions and torchmetrics. Importing it loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relic.metrics.closure import Closeness, loop_closure, mind_gsc, mind_lcm
    from relic.metrics.drift import DriftScore, Look, drift_of, look
    from relic.metrics.pose import (
        PoseEstimate,
        PoseEstimator,
        PoseFiles,
        Pycolmap,
        VisualOdometry,
        anchor_to,
    )
    from relic.metrics.retrieval import (
        PairScores,
        RevisitScore,
        SelfRevisitScore,
        score_frames,
        self_revisit,
        truth_revisit,
    )
    from relic.metrics.revisit import RevisitPairs, RevisitRule, find_revisits, near_identical, verified
    from relic.metrics.similarity import (
        LPIPS,
        FrameMean,
        LPIPSUnavailable,
        load_lpips,
        psnr,
        sharpness,
        sharpness_ratio,
        ssim,
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
    "LPIPS",
    "ActionError",
    "Closeness",
    "DriftScore",
    "FrameMean",
    "LPIPSUnavailable",
    "Look",
    "PairScores",
    "PoseEstimate",
    "PoseEstimator",
    "PoseFiles",
    "Pycolmap",
    "RevisitPairs",
    "RevisitRule",
    "RevisitScore",
    "SelfRevisitScore",
    "StepErrors",
    "TooFewSteps",
    "VisualOdometry",
    "absolute_trajectory_error",
    "action_buckets",
    "align",
    "anchor_to",
    "drift_of",
    "estimator_floor",
    "find_revisits",
    "load_lpips",
    "look",
    "loop_closure",
    "mind_errors",
    "mind_gsc",
    "mind_lcm",
    "near_identical",
    "psnr",
    "relative_pose_error",
    "score_frames",
    "self_revisit",
    "sharpness",
    "sharpness_ratio",
    "ssim",
    "truth_revisit",
    "verified",
]

# names are looked up when used, so that importing this package loads nothing
_HOMES = {
    "ActionError": "trajectory_error",
    "Closeness": "closure",
    "DriftScore": "drift",
    "FrameMean": "similarity",
    "LPIPS": "similarity",
    "LPIPSUnavailable": "similarity",
    "Look": "drift",
    "PairScores": "retrieval",
    "PoseEstimate": "pose",
    "PoseEstimator": "pose",
    "PoseFiles": "pose",
    "Pycolmap": "pose",
    "RevisitPairs": "revisit",
    "RevisitRule": "revisit",
    "RevisitScore": "retrieval",
    "SelfRevisitScore": "retrieval",
    "StepErrors": "trajectory_error",
    "TooFewSteps": "trajectory_error",
    "VisualOdometry": "pose",
    "absolute_trajectory_error": "trajectory_error",
    "action_buckets": "trajectory_error",
    "align": "trajectory_error",
    "anchor_to": "pose",
    "drift_of": "drift",
    "estimator_floor": "trajectory_error",
    "find_revisits": "revisit",
    "load_lpips": "similarity",
    "look": "drift",
    "loop_closure": "closure",
    "mind_errors": "trajectory_error",
    "mind_gsc": "closure",
    "mind_lcm": "closure",
    "near_identical": "revisit",
    "psnr": "similarity",
    "relative_pose_error": "trajectory_error",
    "score_frames": "retrieval",
    "self_revisit": "retrieval",
    "sharpness": "similarity",
    "sharpness_ratio": "similarity",
    "ssim": "similarity",
    "truth_revisit": "retrieval",
    "verified": "revisit",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
