"""What is measured of generated video: functions and torchmetrics. Importing it loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relic.metrics.closure import Closeness, loop_closure, mind_gsc, mind_lcm
    from relic.metrics.drift import DriftScore, Look, drift_of, look
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

__all__ = [
    "LPIPS",
    "Closeness",
    "DriftScore",
    "FrameMean",
    "LPIPSUnavailable",
    "Look",
    "PairScores",
    "RevisitPairs",
    "RevisitRule",
    "RevisitScore",
    "SelfRevisitScore",
    "drift_of",
    "find_revisits",
    "load_lpips",
    "look",
    "loop_closure",
    "mind_gsc",
    "mind_lcm",
    "near_identical",
    "psnr",
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
    "LPIPS": "similarity",
    "Closeness": "closure",
    "DriftScore": "drift",
    "FrameMean": "similarity",
    "LPIPSUnavailable": "similarity",
    "Look": "drift",
    "PairScores": "retrieval",
    "RevisitPairs": "revisit",
    "RevisitRule": "revisit",
    "RevisitScore": "retrieval",
    "SelfRevisitScore": "retrieval",
    "drift_of": "drift",
    "find_revisits": "revisit",
    "load_lpips": "similarity",
    "look": "drift",
    "loop_closure": "closure",
    "mind_gsc": "closure",
    "mind_lcm": "closure",
    "near_identical": "revisit",
    "psnr": "similarity",
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
