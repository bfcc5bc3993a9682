"""How far the camera of a video strays from its commanded path: relative pose error, ATE, by action.

A single camera has no scale, so an estimate is laid over the truth by a similarity first (Umeyama 1991, on
camera centres). Of it only the scale reaches the relative pose error, whose motions are taken in the axes of
the camera. On a path that only turns, the scale is ill-conditioned: rotation is reported there, and no
translation. An estimate that stands still gets scale 0, and misses every step whole.

An estimate has one row a frame, NaN where the frame was not registered. Such frames are not scored and not
hidden: coverage is reported beside every score. Translations are in d̄ when `d_bar` is the truth's mean step
in its own unit (poses of `relic.ops.actions.integrate` are in d̄ already), rotations in degrees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from relic.metrics.pose.estimator import PoseEstimator, check_estimate
from relic.ops.actions import CHANNELS, STATIC, encode_actions
from relic.ops.camera import check_rigid, invert_rigid, rigid, turn_deg, umeyama
from relic.types import Clip

__all__ = [
    "ActionError",
    "StepErrors",
    "TooFewSteps",
    "absolute_trajectory_error",
    "action_buckets",
    "align",
    "estimator_floor",
    "mind_errors",
    "relative_pose_error",
]

FEWEST_STEPS: Final = 8
DELTAS: Final = (1, 8)  # frames
LEAST_PATH: Final = 0.5  # d̄ from the first position; a path that stays nearer only turns
ACTIVE: Final = (0.1, 0.2)  # d̄ and degrees a frame: an action of less does not count as one
MIND_FRAMES: Final = 97
MIND_MOST_DEG: Final = 179.0
MIND_TRANSLATION: Final = frozenset(["w", "a", "s", "d", "forward", "backward", "left", "right"])
MIND_ROTATION: Final = frozenset(
    f"{kind}_{way}"
    for kind, ways in {"cam": "left right up down", "yaw": "left right", "pitch": "up down"}.items()
    for way in ways.split()
)


class TooFewSteps(ValueError):
    """A clip has fewer than 8 steps with a pose at both ends."""


class StepErrors(NamedTuple):
    """Errors of the motions from frame i to i + delta, n = f − delta.

    trans: (n,) float64, NaN where not valid, and everywhere when the truth only turns.
    rot_deg: (n,) float64 in [0, 180], NaN where not valid.
    valid: (n,) bool, both frames are registered.
    """

    trans: Tensor
    rot_deg: Tensor
    valid: Tensor


def align(estimated: Tensor, truth: Tensor) -> Tensor:
    """Lay estimated c2w (f, 4, 4) over true c2w (f, 4, 4) by a similarity of centres -> (f, 4, 4) float64.

    Rows that are not registered (NaN) stay so. An estimate that stands still goes to the mean true position.
    """
    estimated, truth, registered = _checked(estimated, truth)
    centres, goals = estimated[registered, :3, 3], truth[registered, :3, 3]
    if not len(centres):
        return estimated
    spread = centres - centres.mean(0)
    if spread.square().sum(1).mean() < 1e-18:
        scale, rotation = torch.zeros((), dtype=torch.float64), torch.eye(3, dtype=torch.float64)
        shift = goals.mean(0)
    else:
        scale, rotation, shift = umeyama(centres, goals)
    laid = rigid(rotation @ estimated[:, :3, :3], scale * estimated[:, :3, 3] @ rotation.mT + shift)
    return torch.where(registered[:, None, None], laid, torch.nan)


def relative_pose_error(estimated: Tensor, truth: Tensor, *, delta: int, d_bar: float = 1.0) -> StepErrors:
    """Compare motions over `delta` frames after alignment: E = (Q_i⁻¹ Q_{i+Δ})⁻¹ (P_i⁻¹ P_{i+Δ}).

    estimated: (f, 4, 4) c2w P, NaN where not registered; truth: (f, 4, 4) c2w Q; d_bar: the unit of the
    result, in the truth's unit (Sturm et al. 2012, eq. 1–2).

    Raises:
        TooFewSteps: If fewer than 8 motions have a pose at both ends.
        ValueError: If lengths differ, a matrix is not rigid, or `delta` is not positive.
    """
    if delta < 1:
        raise ValueError(f"delta={delta} must be at least 1 frame.")
    estimated, truth, registered = _checked(estimated, truth)
    valid = registered[:-delta] & registered[delta:]
    if int(valid.sum()) < FEWEST_STEPS:
        raise TooFewSteps(
            f"{int(valid.sum())} of {max(0, len(truth) - delta)} motions over {delta} frames have a pose at "
            f"both ends; {FEWEST_STEPS} are needed. Take a longer clip, or one with more to see."
        )
    aligned = align(estimated, truth)
    true = invert_rigid(truth[:-delta]) @ truth[delta:]
    error = invert_rigid(true) @ invert_rigid(aligned[:-delta]) @ aligned[delta:]
    trans = error[:, :3, 3].norm(dim=-1) / d_bar
    if not _travels(truth[registered], d_bar=d_bar):
        trans = torch.full_like(trans, torch.nan)
    return StepErrors(trans=trans, rot_deg=turn_deg(error[:, :3, :3]), valid=valid)


def absolute_trajectory_error(estimated: Tensor, truth: Tensor, *, d_bar: float = 1.0) -> Tensor:
    """Return the root mean square distance () of aligned camera centres, NaN when the truth only turns.

    Arguments as in `relative_pose_error` (Sturm et al. 2012, eq. 3–4).

    Raises:
        TooFewSteps: If fewer than 9 frames are registered.
        ValueError: If lengths differ or a matrix is not rigid.
    """
    estimated, truth, registered = _checked(estimated, truth)
    if int(registered.sum()) <= FEWEST_STEPS:
        raise TooFewSteps(
            f"{int(registered.sum())} of {len(truth)} frames are registered; {FEWEST_STEPS + 1} are needed."
        )
    if not _travels(truth[registered], d_bar=d_bar):
        return torch.tensor(torch.nan, dtype=torch.float64)
    off = (align(estimated, truth) - truth)[registered, :3, 3] / d_bar
    return off.square().sum(-1).mean().sqrt()


def action_buckets(actions: Tensor, *, delta: int) -> dict[str, Tensor]:
    """Say which motions over `delta` frames are of which kind: name -> (f − delta,) bool.

    actions: (f, 13), label t moves frame t−1 to t; a motion's action is the mean over its frames.
    `translation`, `rotation`, `combined` and `still` divide the motions; an axis (`dolly_in`, …) has every
    motion in which it is active, alone or not.
    """
    mean = actions[1:].double().unfold(0, delta, 1).mean(-1)
    least = torch.tensor([ACTIVE[0]] * 6 + [ACTIVE[1]] * 6, dtype=torch.float64)
    active = mean[:, :STATIC] >= least
    moves, turns = active[:, :6].any(1), active[:, 6:].any(1)
    kinds = {
        "translation": moves & ~turns,
        "rotation": turns & ~moves,
        "combined": moves & turns,
        "still": ~moves & ~turns,
    }
    return kinds | dict(zip(CHANNELS[:STATIC], active.unbind(1), strict=True))


def mind_errors(
    estimated: Tensor, truth: Tensor, *, actions: Sequence[str], delta: int = 1
) -> dict[str, dict[str, float]]:
    """Score as MIND does (its code at 8f9c59c, traps included): bucket -> count, means and medians.

    estimated, truth: (f, 4, 4) c2w, in MIND both from ViPE, from the end of the given context on, all
    registered; actions: one name a frame ("forward+look_left", "no_op"), the first moves frame 0 to 1.

    What differs from `ActionError`: only the first 97 frames; the unit is the truth's; motions that are off
    by more than 179° are dropped; the similarity is used on pure rotations too, where its scale means little.
    A name of two actions is "other". The rotation bucket knows `cam_`, `yaw_` and `pitch_` names, but those
    read from `action.json` begin with `look_`, so that turns are "other", too.

    Raises:
        TooFewSteps: If fewer than 8 motions are left (MIND leaves the clip out).
        ValueError: If a frame is not registered or a matrix is not rigid.
    """
    steps = min(len(actions), min(MIND_FRAMES, len(estimated), len(truth)) - delta)
    if steps < 1:
        raise TooFewSteps(f"{len(actions)} actions and {len(truth)} poses leave no motion to score.")
    estimated, truth = estimated[: steps + delta], truth[: steps + delta]
    estimated, truth, registered = _checked(estimated, truth)
    if not registered.all():
        raise ValueError(
            f"frame {int((~registered).nonzero()[0])} is not registered; MIND's score needs every frame."
        )
    aligned = align(estimated, truth)
    true = invert_rigid(truth[:-delta]) @ truth[delta:]
    error = invert_rigid(true) @ invert_rigid(aligned[:-delta]) @ aligned[delta:]
    trans, rot = error[:, :3, 3].norm(dim=-1), turn_deg(error[:, :3, :3])
    kept = (rot <= MIND_MOST_DEG).nonzero()[:, 0].tolist()
    if len(kept) < FEWEST_STEPS:
        raise TooFewSteps(f"{len(kept)} motions are left; {FEWEST_STEPS} are needed.")
    groups: dict[str, list[int]] = {"__overall__": kept}
    for i in kept:
        groups.setdefault(_mind_bucket(actions[i]), []).append(i)
    for i in kept:
        groups.setdefault(f"act:{actions[i]}", []).append(i)
    return {name: _mind_summary(trans[rows], rot[rows]) for name, rows in groups.items()}


def _mind_bucket(action: str) -> str:
    name = action.lower()
    if name in MIND_TRANSLATION:
        return "translation"
    return "rotation" if name in MIND_ROTATION else "other"


def _mind_summary(trans: Tensor, rot: Tensor) -> dict[str, float]:
    return {
        "count": len(trans),
        "rpe_trans_mean": float(trans.mean()),
        "rpe_trans_median": float(trans.quantile(0.5)),
        "rpe_rot_mean_deg": float(rot.mean()),
        "rpe_rot_median_deg": float(rot.quantile(0.5)),
    }


BUCKETS: Final = ("translation", "rotation", "combined", "still", *CHANNELS[:STATIC])
SCORES: Final = tuple(
    f"rpe_{what}{'' if delta == 1 else f'_{delta}'}" for delta in DELTAS for what in ("trans", "rot_deg")
)
SUMMED: Final = (*SCORES, *(f"{score}/{bucket}" for score in SCORES for bucket in BUCKETS), "ate", "coverage")
ALWAYS: Final = (*SCORES, "ate", "coverage")


class ActionError(Metric):
    """Collect action-following errors over clips; sums over processes.

    `compute` gives `action/rpe_trans`, `action/rpe_rot_deg`, the same over 8 frames (`…_8`), `action/ate`,
    `action/coverage` (share of frames registered) and, where there were such motions,
    `action/rpe_trans/dolly_in` and so on. Relative errors are means over all valid motions, ATE is a mean
    over clips. `action/unscored` counts clips with too few registered frames, which only coverage knows of.
    Where floors were given, every key has a `_floor` sibling: the same score of the same estimator on the
    true videos. What nothing was measured for is NaN.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    floor_sums: Tensor
    floor_counts: Tensor
    unscored: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("sums", "counts", "floor_sums", "floor_counts"):
            zeros = torch.zeros(len(SUMMED), dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")
        self.add_state("unscored", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        estimated: Tensor,
        truth: Tensor,
        *,
        actions: Tensor | None = None,
        floor: Tensor | None = None,
        d_bar: float = 1.0,
    ) -> None:
        """Add a clip.

        estimated: (f, 4, 4) c2w found in the generated video, NaN where not registered.
        truth: (f, 4, 4) c2w, commanded; d_bar: its mean step.
        actions: (f, 13) of the truth; read from its poses where not given.
        floor: (f, 4, 4) c2w found in the true video.
        """
        actions = encode_actions(truth.cpu(), d_bar=d_bar) if actions is None else actions.cpu()
        if actions.shape != (len(truth), len(CHANNELS)):
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}; {len(truth)} poses need "
                f"({len(truth)}, {len(CHANNELS)})."
            )
        sums, counts = _clip_sums(estimated.cpu(), truth.cpu(), actions=actions, d_bar=d_bar)
        self.sums += sums.to(self.sums)
        self.counts += counts.to(self.counts)
        self.unscored += int(counts[SUMMED.index("rpe_rot_deg")] == 0)
        if floor is not None:
            sums, counts = _clip_sums(floor.cpu(), truth.cpu(), actions=actions, d_bar=d_bar)
            self.floor_sums += sums.to(self.floor_sums)
            self.floor_counts += counts.to(self.floor_counts)

    def compute(self) -> dict[str, Tensor]:
        """Return every score that was measured, by its public name."""
        scores = {"action/unscored": self.unscored}
        for suffix, sums, counts in (
            ("", self.sums, self.counts),
            ("_floor", self.floor_sums, self.floor_counts),
        ):
            for name, total, count in zip(SUMMED, sums, counts, strict=True):
                if count > 0 or (name in ALWAYS and counts[-1] > 0):
                    scores[f"action/{name}{suffix}"] = total / count
        return scores


def estimator_floor(clips: Iterable[Clip], estimator: PoseEstimator) -> Mapping[str, Tensor]:
    """Return the scores of an estimator on true videos: what no generated video can be seen to beat.

    Keys are those of `ActionError`, with no suffix; translations are in each clip's d̄.
    """
    metric = ActionError()
    for clip in clips:
        found = estimator.estimate(clip.video, intrinsics_px=clip.intrinsics_px)
        metric.update(found.c2w, clip.c2w, d_bar=clip.d_bar)
    return metric.compute()


def _clip_sums(estimated: Tensor, truth: Tensor, *, actions: Tensor, d_bar: float) -> tuple[Tensor, Tensor]:
    """Return the sums and counts of a clip, each (len(SUMMED),), float64."""
    registered = _checked(estimated, truth)[2]
    found = {"coverage": (float(registered.sum()), len(truth))}
    for delta in DELTAS:
        try:
            errors = relative_pose_error(estimated, truth, delta=delta, d_bar=d_bar)
        except TooFewSteps:
            continue  # the clip counts in coverage alone
        everything = torch.ones_like(errors.valid)
        buckets = {"": everything} | action_buckets(actions, delta=delta)
        for what, values in (("trans", errors.trans), ("rot_deg", errors.rot_deg)):
            score = f"rpe_{what}{'' if delta == 1 else f'_{delta}'}"
            for bucket, members in buckets.items():
                chosen = values[members & errors.valid & ~values.isnan()]
                name = f"{score}/{bucket}" if bucket else score
                found[name] = (float(chosen.sum()), len(chosen))
        if delta == 1:
            ate = absolute_trajectory_error(estimated, truth, d_bar=d_bar)
            found["ate"] = (0.0, 0) if ate.isnan() else (float(ate), 1)
    pairs = torch.tensor([found.get(name, (0.0, 0)) for name in SUMMED], dtype=torch.float64)
    return pairs[:, 0], pairs[:, 1]


def _checked(estimated: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both paths in float64 and which frames are registered, or raise ValueError."""
    check_rigid(truth, name="truth")
    registered = check_estimate(estimated, frames=len(truth))
    return estimated.double(), truth.double(), registered


def _travels(truth: Tensor, *, d_bar: float) -> bool:
    """Return whether a path goes anywhere, or only turns."""
    return bool((truth[:, :3, 3] - truth[0, :3, 3]).norm(dim=-1).max() > LEAST_PATH * d_bar)
