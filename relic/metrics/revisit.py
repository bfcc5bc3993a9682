"""Revisits: frames of a camera path that show a view again after it was out of sight, found from poses.

There is no depth, so co-visibility is the overlap of frusta over a band of depths
(`relic.ops.covisibility.frustum_overlap`). Frusta pass through walls, so the two cameras must also stand
close together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from relic.ops.actions import mean_step
from relic.ops.camera import check_rigid, invert_rigid, turn_deg
from relic.ops.covisibility import frustum_overlap

__all__ = ["RevisitPairs", "RevisitRule", "find_revisits", "near_identical", "verified"]

OFF_CENTRE = 0.1  # of the picture; how far the optical centre may lie from its middle
DEG_PER_STEP = 2.0  # a turn of this many degrees counts as one d̄ where poses are compared


@dataclass(frozen=True, kw_only=True)
class RevisitRule:
    """When a view counts as revisited. Print it beside every score: `str(rule)` is one line.

    Args:
        covisibility: Share of the view that an earlier frame must have seen, in (0, 1].
        apart: Farthest that frame and this one may stand apart, in d̄: beyond the nearest depth of the band
            (8 d̄) a wall may be between them. Positive.
        gap_seconds: How long the view must have been out of sight: from the last frame before it left that
            saw this share to the first one after. Positive.
        left_below: The view has left when a frame in between sees less than this share of it; below
            `covisibility`.
        slack: How much an estimated camera may miss both shares by and still count as one that left and
            returned (estimates are noisy); the two must not meet.
        same_position: Two poses are near-identical up to this distance, in d̄.
        same_turn_deg: And up to this turn, in degrees.

    Raises:
        ValueError: If a number is out of range.
    """

    covisibility: float = 0.8
    apart: float = 8.0
    gap_seconds: float = 1.0
    left_below: float = 0.3
    slack: float = 0.15
    same_position: float = 0.25
    same_turn_deg: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.covisibility <= 1:
            raise ValueError(f"covisibility={self.covisibility} is a share of the view, in (0, 1]; use 0.8.")
        if not 0 < self.left_below < self.covisibility:
            raise ValueError(
                f"left_below={self.left_below} must be above 0 and below covisibility={self.covisibility}: "
                "between them a view neither left nor returned."
            )
        for name, usual in (("apart", 8), ("gap_seconds", 1)):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive; use {usual}.")
        if not 0 <= self.slack < (self.covisibility - self.left_below) / 2:
            raise ValueError(
                f"slack={self.slack} must be at least 0 and less than half the way from "
                f"left_below={self.left_below} to covisibility={self.covisibility}, else a camera that rests "
                "could count as one that left and returned."
            )
        for name in ("same_position", "same_turn_deg"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")

    def __str__(self) -> str:
        return (
            f"co-visibility ≥ {self.covisibility:g} from ≤ {self.apart:g} d̄ apart, out of sight ≥ "
            f"{self.gap_seconds:g} s, left below {self.left_below:g}; estimated cameras ± {self.slack:g}; "
            f"near-identical poses within {self.same_position:g} d̄ and {self.same_turn_deg:g}°"
        )


class RevisitPairs(NamedTuple):
    """Frames that show a view again, one row each, in order of time. May be empty.

    now: (n,) int64, the frame that shows it again.
    seen: (n,) int64, the most co-visible frame before it left.
    away: (n,) int64, the frame in between that sees least of it.
    gap: (n,) float64, seconds for which it was out of sight.
    """

    now: Tensor
    seen: Tensor
    away: Tensor
    gap: Tensor

    def keep(self, mask: Tensor) -> RevisitPairs:
        """Return the rows where `mask` (n,) is true."""
        return RevisitPairs(*(column[mask] for column in self))


def find_revisits(
    c2w: Tensor,
    intrinsics_px: Tensor,
    *,
    fps: float,
    size: tuple[int, int],
    rule: RevisitRule | None = None,
    d_bar: float | None = None,
    prefix_frames: int | None = None,
) -> RevisitPairs:
    """Find the frames of a path that show again what had left the view.

    A frame `now` is a revisit if some frames before it saw at least `rule.covisibility` of its view from
    within `rule.apart`, the view left since (`rule.left_below`), and was out of sight for `rule.gap_seconds`.
    Of the frames before it left, `seen` is the most co-visible one; of equals, the one of the nearest pose,
    then the latest.

    Args:
        c2w: (f, 4, 4), scene units.
        intrinsics_px: (4,) `fx fy cx cy` for pictures of `size`, optical centre in the middle.
        fps: Frames a second.
        size: Height and width in pixels.
        rule: What counts as a revisit; None for the defaults of `RevisitRule`.
        d_bar: Scene units of a step, the unit of the depths; None for the path's own mean moving step.
        prefix_frames: With a true prefix: `seen` lies inside it and `now` behind it. None for anywhere.

    Raises:
        ValueError: If poses are not rigid or not finite, or a number is out of range.
    """
    rule = rule or RevisitRule()
    _check_path(c2w)
    reach = _reach(intrinsics_px, size)
    if not fps > 0:
        raise ValueError(f"fps={fps} must be positive.")
    frames = len(c2w)
    if prefix_frames is not None and not 1 <= prefix_frames <= frames:
        raise ValueError(
            f"prefix_frames={prefix_frames} must be between 1 and the {frames} frames there are."
        )
    poses = _in_steps(c2w, d_bar)
    rows = []
    for frame in range(prefix_frames or 0, frames):
        shares = frustum_overlap(poses[: frame + 1], poses[frame], reach=reach)
        out = (shares < rule.left_below).nonzero()[:, 0]
        if not len(out):
            continue
        steps = (poses[: frame + 1, :3, 3] - poses[frame, :3, 3]).norm(dim=-1)
        sees = (shares >= rule.covisibility) & (steps <= rule.apart)
        last_out = int(out[-1])
        before = sees[:last_out].nonzero()[:, 0]
        known = before if prefix_frames is None else before[before < prefix_frames]
        if not len(known):
            continue
        again = last_out + 1 + int(sees[last_out + 1 :].nonzero()[0, 0])  # `frame` itself at the latest
        unseen = (again - int(before[-1])) / fps
        if unseen < rule.gap_seconds:
            continue
        best = known[shares[known] == shares[known].max()]
        far = _distance(poses[best], poses[frame])
        source = int(best[far <= far.min() + 1e-9][-1])
        rows.append((frame, source, source + int(shares[source:frame].argmin()), unseen))
    now, seen, away, gap = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).T.contiguous()
    return RevisitPairs(now.long(), seen.long(), away.long(), gap)


def near_identical(
    pairs: RevisitPairs, c2w: Tensor, *, rule: RevisitRule | None = None, d_bar: float | None = None
) -> RevisitPairs:
    """Keep the pairs whose two poses are near-identical (`rule.same_position`, `rule.same_turn_deg`).

    c2w: (f, 4, 4) that the pairs were found on; d_bar as in `find_revisits`.
    """
    rule = rule or RevisitRule()
    _check_path(c2w)
    poses = _in_steps(c2w, d_bar)
    motion = invert_rigid(poses[pairs.seen]) @ poses[pairs.now]
    close = motion[:, :3, 3].norm(dim=-1) <= rule.same_position
    return pairs.keep(close & (turn_deg(motion[:, :3, :3]) <= rule.same_turn_deg))


def verified(
    pairs: RevisitPairs,
    estimated_c2w: Tensor,
    *,
    intrinsics_px: Tensor,
    size: tuple[int, int],
    d_bar: float,
    rule: RevisitRule | None = None,
) -> RevisitPairs:
    """Keep the pairs for which the camera of a generated video, as estimated, left the view and returned.

    Returned: the estimated camera at `now` sees what it saw at `seen`; left: a registered frame in between
    does not (each within `rule.slack`). A pair with an unregistered frame is not verified. If pairs were
    found and none is verified, the clip *did not move*.

    Args:
        pairs: From `find_revisits` on the commanded poses.
        estimated_c2w: (f, 4, 4) in the scale of the scene, rows of NaN where a frame is not registered.
        intrinsics_px: (4,) `fx fy cx cy`.
        size: Height and width in pixels.
        d_bar: Scene units of a step.
        rule: The rule the pairs were found by.

    Raises:
        ValueError: If registered poses are not rigid, or the estimate is shorter than the path.
    """
    rule = rule or RevisitRule()
    reach = _reach(intrinsics_px, size)
    if not len(pairs.now):
        return pairs
    registered = estimated_c2w.cpu().flatten(1).isfinite().all(1)
    if len(registered) <= int(pairs.now.max()):
        raise ValueError(
            f"estimated_c2w has {len(registered)} frames, but a pair names frame {int(pairs.now.max())}; "
            "give a row for every frame, NaN where it is not registered."
        )
    check_rigid(estimated_c2w[registered.to(estimated_c2w.device)], name="estimated_c2w (registered)")
    poses = _in_steps(estimated_c2w, d_bar)
    moved = []
    for now, seen in zip(pairs.now.tolist(), pairs.seen.tolist(), strict=True):
        if not (registered[now] and registered[seen]):
            moved.append(False)
            continue
        there = torch.arange(seen, now)[registered[seen:now]]
        shares = frustum_overlap(poses[there], poses[now], reach=reach)  # the first is `seen`
        returned = shares[0] >= rule.covisibility - rule.slack
        moved.append(bool(returned and shares.min() < rule.left_below + rule.slack))
    return pairs.keep(torch.tensor(moved, dtype=torch.bool))


def _check_path(c2w: Tensor) -> None:
    if c2w.ndim != 3 or not len(c2w):
        raise ValueError(f"c2w is {tuple(c2w.shape)}; it must be (f, 4, 4) with at least one frame.")
    check_rigid(c2w)


def _in_steps(c2w: Tensor, d_bar: float | None) -> Tensor:
    """Return poses on the CPU in float64, positions in d̄."""
    poses = c2w.double().cpu().clone()
    unit = mean_step(poses)[0] if d_bar is None else d_bar
    if not 0 < unit < float("inf"):
        raise ValueError(f"d_bar={d_bar} must be positive: the scene units of one step.")
    poses[:, :3, 3] /= unit
    return poses


def _reach(intrinsics_px: Tensor, size: tuple[int, int]) -> tuple[float, float]:
    """Return half the width and half the height of a picture in focal lengths."""
    height, width = size
    if intrinsics_px.shape != (4,) or not intrinsics_px.isfinite().all() or intrinsics_px[:2].min() <= 0:
        raise ValueError(
            f"intrinsics_px={intrinsics_px.tolist()} must be four finite numbers fx fy cx cy, focal lengths "
            "positive."
        )
    fx, fy, cx, cy = intrinsics_px.tolist()
    off = abs(cx - (width - 1) / 2) / width, abs(cy - (height - 1) / 2) / height
    if max(off) > OFF_CENTRE:
        raise ValueError(
            f"intrinsics_px: the optical centre ({cx:g}, {cy:g}) is not in the middle of a picture {height} "
            f"high and {width} wide; are they of another size? Scale them with the picture."
        )
    return width / 2 / fx, height / 2 / fy


def _distance(poses: Tensor, pose: Tensor) -> Tensor:
    """Return how far poses (n, 4, 4) are from one, in d̄ and turns of `DEG_PER_STEP`."""
    motion = invert_rigid(pose) @ poses
    return motion[:, :3, 3].norm(dim=-1) + turn_deg(motion[:, :3, :3]) / DEG_PER_STEP
