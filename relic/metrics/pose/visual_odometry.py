"""Camera poses from video by visual odometry: points followed by Lucas–Kanade, then bundle adjustment."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relic.metrics.pose.bundle import Problem, State, adjust, cost, residuals, seen_from
from relic.metrics.pose.estimator import PoseEstimate, check_video
from relic.metrics.pose.tracks import Tracks, follow

__all__ = ["VisualOdometry"]

WINDOW: Final = 16  # frames adjusted together
EVERY: Final = 4  # frames between adjustments
COARSE_PX: Final = (8.0, 2.0, 0.5)  # softness, from a guess to a fit
FINE_PX: Final = 0.2
PULL_PX: Final = 0.1  # of the prior on depth on the way, and in the end
LAST_PULL_PX: Final = 0.015
CHECKS: Final = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 112, 160, 224, 320, 448, 640)
SURER: Final = 0.9  # the mirrored reading must cost less than this share to be taken
DECIDED: Final = 2.0  # times as costly a mirrored reading, twice running, ends the checks
NEIGHBOURS: Final = 5  # points that a new point's depth is guessed from
TURN_ONLY_PX: Final = 0.5  # turning alone must bring 90 of 100 sightings this near
LOST: Final = 1e3  # times the depth of the first points
PARALLAX_PX: Final = 1.0  # a tenth of the sightings must show this much before the mirrored reading is tried


class VisualOdometry:
    """Estimate poses with OpenCV and numpy on one core; deterministic; scale is free.

    Points are followed through the video, measured against the picture that they come from, and bundle-
    adjusted (inverse depth, robust), frame by frame and in the end together. Motion along an edge is not
    measured, so flat pictures with few corners still count. Where the sightings are explained by turning
    alone, the translation is zero. Frames on which too little is found are not registered.

    Two readings of one video can look alike: near and far exchanged, the motion reversed (Necker reversal).
    Both are tried while the difference shows; over a flat wall it may not.

    A single camera has no scale: the first step longer than a tenth of the longest has length 1.
    """

    def estimate(self, video: Tensor, *, intrinsics_px: Tensor) -> PoseEstimate:
        """Return the poses of video (f, h, w, 3) uint8 with `fx fy cx cy` (4,), pixel centres at integers.

        Raises:
            ImportError: If OpenCV is not installed.
            ValueError: If the video has another shape or type, or the intrinsics are no camera.
        """
        check_video(video, intrinsics_px)
        tracks, factor = follow(video.cpu().numpy())
        fx, fy, cx, cy = intrinsics_px.double().tolist()
        focal = factor * np.array([fx, fy])
        centre = factor * (np.array([cx, cy]) + 0.5) - 0.5
        c2w = np.full((len(video), 4, 4), np.nan)
        if tracks.registered.any():
            c2w[tracks.registered] = _solve(tracks, focal=focal, centre=centre)
        registered = np.isfinite(c2w).all((1, 2))
        return PoseEstimate(c2w=torch.from_numpy(c2w), registered=torch.from_numpy(registered))


def _solve(tracks: Tracks, *, focal: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return c2w (r, 4, 4) of the followed frames, the first at the origin; NaN once the scale is lost."""
    frames, points = int(tracks.registered.sum()), len(tracks.anchor)
    place = np.cumsum(tracks.registered) - 1
    problem = Problem(
        ray=np.concatenate([(tracks.origin - centre) / focal, np.ones((points, 1))], axis=1),
        anchor=place[tracks.anchor],
        frame=place[tracks.frame],
        track=tracks.track,
        pixel=tracks.pixel - centre,
        certainty=tracks.certainty,
        focal=focal,
    )
    state = State(
        rotation=np.tile(np.eye(3), (frames, 1, 1)),
        translation=np.zeros((frames, 3)),
        inverse=np.ones(points),
        prior=np.ones(points),
    )
    if len(problem.track):
        state = _Walk(problem, state).run()
    reached = len(state.rotation)
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:reached, :3, :3] = np.swapaxes(state.rotation, 1, 2)
    c2w[:reached, :3, 3] = -np.einsum("fij,fj->fi", c2w[:reached, :3, :3], state.translation)
    steps = np.linalg.norm(np.diff(c2w[:reached, :3, 3], axis=0), axis=1)
    if len(steps) and steps.max() > 0:
        c2w[:, :3, 3] /= steps[np.argmax(steps > 0.1 * steps.max())]
    c2w[reached:] = np.nan
    return c2w


class _Span(NamedTuple):
    """Sightings and new points of a stretch of frames, as slices."""

    sightings: np.ndarray
    births: np.ndarray


class _Walk:
    """Place frames one after the other, adjusting the last few together now and then."""

    def __init__(self, problem: Problem, state: State) -> None:
        self.problem, self.state = problem, state
        frames = np.arange(len(state.rotation) + 1)
        self._frames = frames[:-1]
        self._span = _Span(np.searchsorted(problem.frame, frames), np.searchsorted(problem.anchor, frames))
        self._surely = 0  # checks in a row that the mirrored reading has clearly lost

    def run(self) -> State:
        """Return the poses that explain all sightings, of the frames up to where the scale is lost."""
        last, reached = len(self._frames) - 1, len(self._frames)
        for frame in range(1, last + 1):
            self._guess(frame)
            seen = self._seen(frame, frame + 1)
            for soft in COARSE_PX:
                self._adjust(seen, free=self._frames == frame, iterations=5, soft=soft, deep=False)
            self._start_points(frame)
            if frame % EVERY == 0 or frame == last:
                low = max(0, frame - WINDOW)
                free = (self._frames > low) & (self._frames <= frame)
                seen = self._seen(max(0, low - WINDOW // 2), frame + 1)
                self._adjust(seen, free=free, iterations=4, soft=COARSE_PX[-1])
            if (frame in CHECKS or frame == last) and self._surely < 2:
                self._check_mirrored(frame)
            if self._scale_is_lost(frame):
                reached = frame
                break
        seen = self._seen(0, reached)
        free = (self._frames > 0) & (self._frames < reached)
        self.state = adjust(seen, self.state, free=free, iterations=8, soft=FINE_PX, pull=LAST_PULL_PX)
        state = self._turning_only(seen, free=free) or self.state
        return state._replace(rotation=state.rotation[:reached], translation=state.translation[:reached])

    def _scale_is_lost(self, frame: int) -> bool:
        """Return whether depth or place have slipped away, as where every picture is of something else."""
        born = slice(*self._span.births[frame : frame + 2])
        sizes = np.append(self.state.prior[born], 1 / self.state.prior[born])
        return not max(sizes.max(initial=0), np.abs(self.state.translation[frame]).max()) < LOST

    def _guess(self, frame: int) -> None:
        """Begin with the motion of the frame before."""
        rotation, translation = self.state.rotation, self.state.translation
        rotation[frame], translation[frame] = rotation[frame - 1], translation[frame - 1]
        if frame > 1:
            turn = rotation[frame - 1] @ rotation[frame - 2].T
            rotation[frame] = turn @ rotation[frame - 1]
            translation[frame] = translation[frame - 1] + turn @ (
                translation[frame - 1] - translation[frame - 2]
            )

    def _start_points(self, frame: int) -> None:
        """Guess the depth of new points from those near by in the picture."""
        born = slice(*self._span.births[frame : frame + 2])
        seen = self._seen(frame, frame + 1)
        if born.start == born.stop or not len(seen.track):
            return
        inverse, prior = seen_from(seen, self.state, frame=frame)
        pixel = self.problem.ray[born, :2] * self.problem.focal
        far = np.square(pixel[:, None] - seen.pixel).sum(-1)
        near = np.argsort(far, axis=1, kind="stable")[:, :NEIGHBOURS]
        usual = np.median(prior)
        # a camera that only turns says nothing of depth, and must not let it slip away
        self.state.prior[born] = np.clip(np.median(inverse), usual / 1.5, usual * 1.5)
        self.state.inverse[born] = np.clip(np.median(inverse[near], axis=1), usual / 10, usual * 10)

    def _check_mirrored(self, frame: int) -> None:
        """Take the mirrored reading of everything so far if it explains the sightings better."""
        free = (self._frames > 0) & (self._frames <= frame)
        seen = self._seen(0, frame + 1)
        mine = self.state
        bare = mine._replace(translation=np.zeros_like(mine.translation))
        parallax = np.linalg.norm(residuals(seen, mine) - residuals(seen, bare), axis=1)
        if np.quantile(parallax, 0.9) < PARALLAX_PX:
            return
        self._adjust(seen, free=free, iterations=4, soft=COARSE_PX[-1])
        mine = self.state
        usual = np.median(mine.inverse)
        self.state = State(
            rotation=mine.rotation.copy(),
            translation=-mine.translation,
            inverse=np.maximum(2 * usual - mine.inverse, 0.1 * usual),
            prior=mine.prior.copy(),
        )
        for soft in COARSE_PX[1:]:
            self._adjust(seen, free=free, iterations=6, soft=soft)
        costs = [cost(seen, state, soft=COARSE_PX[-1], pull=PULL_PX) for state in (mine, self.state)]
        if costs[1] >= SURER * costs[0]:
            self.state = mine
        self._surely = self._surely + 1 if costs[1] > DECIDED * costs[0] else 0

    def _turning_only(self, seen: Problem, *, free: np.ndarray) -> State | None:
        """Return the best state without translation if it leaves little unexplained."""
        still = self.state._replace(
            translation=np.zeros_like(self.state.translation), inverse=np.zeros_like(self.state.inverse)
        )
        still = adjust(seen, still, free=free, iterations=20, soft=FINE_PX, deep=False)
        missed = np.linalg.norm(residuals(seen, still), axis=1)
        return still if np.quantile(missed, 0.9) < TURN_ONLY_PX else None

    def _seen(self, start: int, stop: int) -> Problem:
        """Return the sightings on frames from `start` to before `stop`."""
        rows = slice(self._span.sightings[start], self._span.sightings[stop])
        problem = self.problem
        return problem._replace(
            frame=problem.frame[rows],
            track=problem.track[rows],
            pixel=problem.pixel[rows],
            certainty=problem.certainty[rows],
        )

    def _adjust(
        self, seen: Problem, *, free: np.ndarray, iterations: int, soft: float, deep: bool = True
    ) -> None:
        """Adjust the points that are seen, and the free frames; other frames that matter stay put."""
        if not len(seen.track):
            return
        points, track = np.unique(seen.track, return_inverse=True)
        all_frames = np.concatenate([seen.frame, seen.anchor[points], np.flatnonzero(free)])
        frames, place = np.unique(all_frames, return_inverse=True)
        part = Problem(
            ray=seen.ray[points],
            anchor=place[len(track) : len(track) + len(points)],
            frame=place[: len(track)],
            track=track,
            pixel=seen.pixel,
            certainty=seen.certainty,
            focal=seen.focal,
        )
        state = self.state
        small = State(
            state.rotation[frames], state.translation[frames], state.inverse[points], state.prior[points]
        )
        small = adjust(
            part, small, free=free[frames], iterations=iterations, soft=soft, pull=PULL_PX, deep=deep
        )
        state.rotation[frames], state.translation[frames] = small.rotation, small.translation
        state.inverse[points] = small.inverse
