"""The scores of one video beside its truth: memory, motion and drift, each by the metric of that name."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from relic.metrics.closure import loop_closure, mind_lcm
from relic.metrics.drift import drift_of, look
from relic.metrics.pose.estimator import anchor_to
from relic.metrics.retrieval import ROUNDING_DB, RevisitScore, SelfRevisitScore
from relic.metrics.trajectory_error import ActionError
from relic.suite.judges import Judges
from relic.suite.scripts import Measures
from relic.types import Clip

__all__ = ["COUNTS", "look_by_second", "score_video", "seamless"]

DRIFT_SECONDS: Final = 1.0  # at either end
FLAT: Final = -10.0  # log2 of the sharpness that is left in a flat picture: what is there at least
LEAST_COVERAGE: Final = 0.5  # of the frames: with less, motion is not scored
SAME_POSE: Final = 1e-6  # of every entry; a path that closes does so exactly
COUNTS: Final = (
    "memory/pairs", "memory/clips", "memory/no_pair", "memory/did_not_move", "memory/unverified",
    "memory/pairs_self", "memory/clips_self", "memory/no_pair_self", "memory/did_not_move_self",
    "action/unscored",
    "memory/unscored",
)  # fmt: skip


def score_video(
    video: Tensor,
    truth: Clip,
    *,
    prefix: int,
    measures: Measures,
    judges: Judges,
    reconstruction: Tensor | None = None,
) -> dict[str, float]:
    """Return the scores of a video by their public names; NaN where a score has nothing to be taken of.

    A case that measures memory is scored at its revisits against truth, after the prefix frame by frame
    (MIND's long-context memory), by its motion there, and where the path closes by its last frame against its
    first (Echo's). One that measures action is scored by its motion, and at revisits against itself.

    Args:
        video: uint8 (f, h, w, 3), its first frames true.
        truth: What it should equal.
        prefix: How many frames are true.
        measures: Of the case.
        judges: What it is scored with.
        reconstruction: uint8 (f, h, w, 3), the truth through the autoencoder; of the prefix, the estimator
            sees this.

    Raises:
        ValueError: If lengths or sizes differ.
    """
    scores: dict[str, float] = {}
    shown = seamless(video, prefix=prefix, reconstruction=reconstruction)
    metrics: RevisitScore | SelfRevisitScore
    camera = None
    if judges.estimator is not None:
        estimated = judges.estimator.estimate(shown, intrinsics_px=truth.intrinsics_px).c2w
        camera = anchor_to(estimated, truth.c2w)
    if measures == "memory":
        metrics = RevisitScore(rule=judges.rule, lpips=judges.lpips)
        metrics.update(
            video, truth, prefix_frames=prefix, estimated_c2w=camera, reconstruction=reconstruction
        )
        scores |= {name: float(value) for name, value in metrics.compute().items()}
        others = {"lcm": mind_lcm(video, truth.video, context_frames=prefix, lpips=judges.lpips)}
        if torch.allclose(truth.c2w[0], truth.c2w[-1], atol=SAME_POSE):
            others["closure"] = loop_closure(video, lpips=judges.lpips)
        scores |= {
            f"memory/{name}_{tail}": min(value, ROUNDING_DB) if name == "psnr" else value
            for tail, closeness in others.items()
            for name, value in closeness._asdict().items()
            if value is not None
        }
        if camera is not None:
            found = _motion(estimated[prefix - 1 :], truth.c2w[prefix - 1 :], d_bar=truth.d_bar)
            scores |= {
                f"memory/{name.removeprefix('action/')}": value
                for name, value in found.items()
                if name.count("/") == 1  # those by action are few here
            }
    elif camera is not None:
        metrics = SelfRevisitScore(rule=judges.rule, lpips=judges.lpips)
        metrics.update(video, truth, estimated_c2w=camera, reconstruction=reconstruction)
        scores |= {name: float(value) for name, value in metrics.compute().items()}
        scores |= _motion(estimated, truth.c2w, d_bar=truth.d_bar)
    seconds = min(DRIFT_SECONDS, len(video) / 2 / truth.fps)
    scores |= drift_of(shown, fps=truth.fps, seconds=seconds, truth=truth.video)
    if scores["drift/sharpness"] == -math.inf:
        scores["drift/sharpness"] = FLAT
    return {name: value if math.isfinite(value) else math.nan for name, value in scores.items()}


def _motion(estimated: Tensor, c2w: Tensor, *, d_bar: float) -> dict[str, float]:
    """Return how far estimated cameras are from those that were asked for, by the names of `ActionError`."""
    motion = ActionError()
    motion.update(estimated, c2w, d_bar=d_bar)
    found = {name: float(value) for name, value in motion.compute().items()}
    if found["action/coverage"] < LEAST_COVERAGE:  # else losing track early would look like obeying
        return {"action/coverage": found["action/coverage"], "action/unscored": 1.0}
    return found


def seamless(video: Tensor, *, prefix: int, reconstruction: Tensor | None) -> Tensor:
    """Return a video with its true prefix through the autoencoder, like all that follows.

    True frames look sharper than decoded ones: tracks would break where they meet, and that would pass for
    drift.
    """
    return video if reconstruction is None else torch.cat([reconstruction[:prefix], video[prefix:]])


def look_by_second(video: Tensor, *, fps: float) -> dict[str, list[float]]:
    """Return the mean look of each second of a video (f, h, w, 3), by the names of `relic.metrics.Look`."""
    seconds = (torch.arange(len(video)) / fps).long()
    counts = torch.bincount(seconds)
    return {
        name: (torch.bincount(seconds, weights=values.double().cpu()) / counts).tolist()
        for name, values in look(video)._asdict().items()
    }
