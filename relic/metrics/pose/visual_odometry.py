"""Camera poses from video by visual odometry: tracked corners, then bundle adjustment, on one core."""

from __future__ import annotations

from typing import Final

import numpy as np, os

from relic.metrics.pose.bundle import Problem, State, adjust, cost, residuals
from relic.metrics.pose.tracks import Tracks, follow

WINDOW: Final = 16
EVERY: Final = 4
PULL = float(os.environ.get('PULL', '.1'))
FPULL = float(os.environ.get('FPULL', '.015'))


def solve(tracks: Tracks, focal: np.ndarray, centre: np.ndarray, *, final: int = 8, log=None) -> tuple:
    frames = np.flatnonzero(tracks.registered)
    place = np.cumsum(tracks.registered) - 1
    problem = Problem(
        ray=np.concatenate([(tracks.origin - centre) / focal, np.ones((len(tracks.anchor), 1))], 1),
        anchor=place[tracks.anchor], frame=place[tracks.frame], track=tracks.track,
        pixel=tracks.pixel - centre, certainty=tracks.certainty, focal=focal,
    )
    n = len(problem.ray)
    state = State(
        rotation=np.tile(np.eye(3), (len(frames), 1, 1)), translation=np.zeros((len(frames), 3)),
        inverse=np.ones(n), prior=np.ones(n),
    )
    starts = np.searchsorted(problem.frame, np.arange(len(frames) + 1))
    births = np.searchsorted(problem.anchor, np.arange(len(frames) + 1))
    for i in range(1, len(frames)):
        rows = slice(starts[i], starts[i + 1])
        # guess: go on turning as before
        r, t = state.rotation, state.translation
        r[i], t[i] = r[i - 1], t[i - 1]
        if i > 1:
            turn = r[i - 1] @ r[i - 2].T
            r[i], t[i] = turn @ r[i - 1], turn @ t[i - 1] + (t[i - 1] - turn @ t[i - 2])
        here = problem._replace(frame=problem.frame[rows], track=problem.track[rows], pixel=problem.pixel[rows], certainty=problem.certainty[rows])
        free = np.arange(len(frames)) == i
        for soft in (8.0, 2.0, 0.5):
            state = part(here, state, free=free, iterations=5, deep=False, soft=soft)
        born = slice(births[i], births[i + 1])
        if born.stop > born.start and rows.stop > rows.start:
            inv, pri, pix = seen_from(here, state, i)
            new = problem.ray[born, :2] * focal
            d = np.square(new[:, None] - pix[None]).sum(-1)
            near = np.argsort(d, 1)[:, :5]
            state.inverse[born] = np.median(inv[near], 1)
            usual = np.median(pri)
            state.prior[born] = np.clip(np.median(inv), usual / 1.5, usual * 1.5)
            state.inverse[born] = np.clip(state.inverse[born], usual / 10, usual * 10)
        if i % EVERY == 0 or i == len(frames) - 1:
            low = max(0, i - WINDOW)
            free = (np.arange(len(frames)) > low) & (np.arange(len(frames)) <= i)
            wide = slice(starts[max(0, low - WINDOW // 2)], starts[i + 1])
            seen = problem._replace(frame=problem.frame[wide], track=problem.track[wide], pixel=problem.pixel[wide], certainty=problem.certainty[wide])
            state = part(seen, state, free=free, iterations=4)
            if i in CHECKS:
                free = (np.arange(len(frames)) > 0) & (np.arange(len(frames)) <= i)
                seen = sub_rows(problem, slice(0, starts[i + 1]))
                best = part(seen, copy(state), free=free, iterations=6)
                other = mirrored(state, i)
                for soft in (2.0, 0.5):
                    other = part(seen, other, free=free, iterations=8, soft=soft)
                ca, cb = cost(seen, best, soft=.5, pull=PULL), cost(seen, other, soft=.5, pull=PULL)
                if log is not None: log.append((i, round(ca), round(cb)))
                state = other if cb < 0.9 * ca else best
    free = np.arange(len(frames)) > 0
    state = adjust(problem, state, free=free, iterations=final, pull=FPULL)
    return problem, state, frames


CHECKS = (8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 72, 80, 100, 128, 160, 200, 256)
def copy(state):
    return State(*(a.copy() for a in state))
def mirrored(state, i):
    """Return the other reading of the pictures: camera centres mirrored in the first one, near swapped with far."""
    state = copy(state)
    state.translation[:i+1] *= -1
    state.inverse[:] = np.maximum(2 * np.median(state.inverse) - state.inverse, 0.1 * np.median(state.inverse))
    return state
def sub_rows(p, rows):
    return p._replace(frame=p.frame[rows], track=p.track[rows], pixel=p.pixel[rows], certainty=p.certainty[rows])
def seen_from(here, state, i):
    a = here.anchor[here.track]
    rot = state.rotation[i] @ np.swapaxes(state.rotation[a], 1, 2)
    shift = state.translation[i] - np.einsum("nij,nj->ni", rot, state.translation[a])
    inv = state.inverse[here.track]
    z = np.einsum("nij,nj->ni", rot, here.ray[here.track])[:, 2] + inv * shift[:, 2]
    near = np.maximum(z, 0.1)
    return inv / near, state.prior[here.track] / near, here.pixel


def part(problem: Problem, state: State, *, free, iterations, deep=True, soft=0.5) -> State:
    """Adjust only the points that are seen, over only the frames that matter."""
    ids, track = np.unique(problem.track, return_inverse=True)
    anchor = problem.anchor[ids]
    frames, flat = np.unique(np.concatenate([problem.frame, anchor, np.flatnonzero(free)]), return_inverse=True)
    small = Problem(problem.ray[ids], flat[len(track):len(track) + len(ids)], flat[:len(track)], track, problem.pixel, problem.certainty, problem.focal)
    sub = State(state.rotation[frames], state.translation[frames], state.inverse[ids], state.prior[ids])
    sub = adjust(small, sub, free=free[frames], iterations=iterations, deep=deep, soft=soft, pull=PULL)
    state.rotation[frames], state.translation[frames] = sub.rotation, sub.translation
    state.inverse[ids] = sub.inverse
    return state
