"""Bundle adjustment of tracks with inverse depths: damped Gauss–Newton, the depths eliminated.

A point is the ray of its first sighting (its anchor) and an inverse depth along it. One number a point: the
depths leave the normal equations by a division (Schur complement), and a point at infinity is as good as any
other, so that a camera that only turns needs no model of its own. A weak prior on inverse depth holds the
scale, and the translation at rest while nothing shows parallax.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

__all__ = ["Problem", "State", "adjust", "cost", "exponential", "residuals", "seen_from"]

FARTHEST: Final = 1e-4  # least inverse depth, as a share of its prior
BESIDE: Final = 0.1  # least depth against that in the anchor frame
CHUNK: Final = 128  # points eliminated at a time; their frames are few, since points live in time
FARTHEST_STEP: Final = 1e3  # of a pose, radians or units: beyond, the equations were near-singular


class Problem(NamedTuple):
    """What was seen. ray: (n, 3) of each point in its anchor frame, z = 1; anchor: (n,) frame.

    frame, track: (m,) of each sighting; pixel: (m, 2) from the principal point; focal: (2,) pixels.
    certainty: (m, 2, 2) what an error in pixels is multiplied by.
    """

    ray: np.ndarray
    anchor: np.ndarray
    frame: np.ndarray
    track: np.ndarray
    pixel: np.ndarray
    certainty: np.ndarray
    focal: np.ndarray


class State(NamedTuple):
    """What is sought. rotation: (f, 3, 3), translation: (f, 3) of w2c; inverse: (n,) inverse depths > 0.

    prior: (n,) inverse depths that points are drawn to.
    """

    rotation: np.ndarray
    translation: np.ndarray
    inverse: np.ndarray
    prior: np.ndarray


class _Linear(NamedTuple):
    """Sightings linearised, grouped by (frame, anchor)."""

    starts: np.ndarray  # (p,) first sighting of each pair
    order: np.ndarray  # (m,) sightings sorted by pair
    first: np.ndarray  # (p,) frame
    second: np.ndarray  # (p,) anchor frame
    adjoint: np.ndarray  # (p, 6, 6)
    error: np.ndarray  # (m, 2) px, sorted
    pose: np.ndarray  # (m, 2, 6)
    depth: np.ndarray  # (m, 2)


def residuals(problem: Problem, state: State) -> np.ndarray:
    """Return how far sightings lie from where their points project (m, 2), pixels."""
    rotation = state.rotation[problem.frame] @ np.swapaxes(
        state.rotation[problem.anchor[problem.track]], 1, 2
    )
    shift = state.translation[problem.frame] - _apply(
        rotation, state.translation[problem.anchor[problem.track]]
    )
    point = _apply(rotation, problem.ray[problem.track]) + state.inverse[problem.track, None] * shift
    error = problem.pixel - problem.focal * point[:, :2] / np.maximum(point[:, 2:], 1e-3)
    return _apply(problem.certainty, error)


def cost(problem: Problem, state: State, *, soft: float, pull: float) -> float:
    """Return what `adjust` lowers: a Cauchy cost of residuals, soft above `soft` px, and the prior on depth.

    pull: pixels that a point's strain from its prior, a share of it, weighs as much as.
    """
    square = np.square(residuals(problem, state)).sum(1)
    fit = float(soft**2 * np.log1p(square / soft**2).sum())
    return fit + float(pull**2 * np.square(state.inverse / state.prior - 1).sum())


def adjust(
    problem: Problem,
    state: State,
    *,
    free: np.ndarray,
    iterations: int,
    soft: float,
    pull: float = 0.0,
    deep: bool = True,
) -> State:
    """Lower the cost over the poses of `free` frames (f,) bool and, with `deep`, all inverse depths."""
    damping, best = 1e-4, cost(problem, state, soft=soft, pull=pull)
    for _ in range(iterations):
        trial, found = state, np.inf
        try:
            step = _solve(problem, state, free=free, damping=damping, soft=soft, pull=pull, deep=deep)
        except np.linalg.LinAlgError:
            pass  # what is seen leaves a pose open: damp more, as for a step that fails
        else:
            if np.abs(step[0]).max(initial=0.0) < FARTHEST_STEP:
                trial = _moved(state, *step, free=free)
                found = cost(problem, trial, soft=soft, pull=pull)
        if found < best:
            settled = best - found < 1e-5 * best
            state, best, damping = trial, found, max(damping / 10, 1e-8)
            if settled:
                break
        else:
            damping *= 30
            if damping > 1e4:
                break
    return state


def seen_from(problem: Problem, state: State, *, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the inverse depths of sighted points, and of their priors (m,), in the axes of a frame."""
    anchor = problem.anchor[problem.track]
    rotation = state.rotation[frame] @ np.swapaxes(state.rotation[anchor], 1, 2)
    shift = state.translation[frame] - _apply(rotation, state.translation[anchor])
    inverse = state.inverse[problem.track]
    depth = _apply(rotation, problem.ray[problem.track])[:, 2] + inverse * shift[:, 2]
    depth = np.maximum(depth, BESIDE)
    return inverse / depth, state.prior[problem.track] / depth


def _solve(
    problem: Problem, state: State, *, free: np.ndarray, damping: float, deep: bool, soft: float, pull: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return one damped step: poses (k, 6) of the free frames, inverse depths (n,)."""
    linear = _linearise(problem, state)
    weight = 1 / (1 + np.square(linear.error).sum(1) / soft**2)
    weighted = linear.pose * weight[:, None, None]
    # sums over the sightings of a (frame, anchor) pair, then both frames' shares of it
    curvature = np.add.reduceat(np.einsum("mia,mib->mab", weighted, linear.pose), linear.starts)
    slope = np.add.reduceat(np.einsum("mia,mi->ma", weighted, linear.error), linear.starts)
    back = -np.swapaxes(linear.adjoint, 1, 2)
    crossed = curvature @ -linear.adjoint
    place, count = np.cumsum(free) - 1, int(free.sum())
    here, there = place[linear.first], place[linear.second]
    one, two = free[linear.first], free[linear.second]
    both = one & two
    blocks, slopes = np.zeros((count, count, 6, 6)), np.zeros((count, 6))
    np.add.at(blocks, (here[one], here[one]), curvature[one])
    np.add.at(blocks, (there[two], there[two]), (back @ crossed)[two])
    np.add.at(blocks, (here[both], there[both]), crossed[both])
    np.add.at(blocks, (there[both], here[both]), np.swapaxes(crossed, 1, 2)[both])
    np.add.at(slopes, here[one], slope[one])
    np.add.at(slopes, there[two], _apply(back, slope)[two])
    hessian, gradient = blocks.transpose(0, 2, 1, 3).reshape(6 * count, 6 * count), slopes.ravel()
    diagonal = np.diag_indices_from(hessian)
    hessian[diagonal] = (1 + damping) * hessian[diagonal] + 1e-9
    if not deep:
        return np.linalg.solve(hessian, gradient).reshape(count, 6), np.zeros(len(state.inverse))
    track, points = problem.track[linear.order], len(state.inverse)
    hold = np.square(pull / state.prior)
    own = (1 + damping) * (np.bincount(track, weight * np.square(linear.depth).sum(1), points) + hold)
    ask = np.bincount(track, weight * (linear.depth * linear.error).sum(1), points)
    ask -= hold * (state.inverse - state.prior)
    pair = np.repeat(np.arange(len(linear.starts)), np.diff([*linear.starts, len(track)]))
    mixed = np.einsum("mia,mi->ma", weighted, linear.depth)
    # what ties each point to a free frame: sightings, and their anchors
    ties = _Ties(
        point=np.concatenate([track[one[pair]], track[two[pair]]]),
        frame=np.concatenate([here[pair][one[pair]], there[pair][two[pair]]]),
        value=np.concatenate([mixed[one[pair]], _apply(back[pair], mixed)[two[pair]]]),
    )
    return _eliminate(hessian, gradient, ties, own=own, ask=ask)


class _Ties(NamedTuple):
    """Mixed derivatives of the cost: point (m,), free frame (m,), value (m, 6); a pair may come twice."""

    point: np.ndarray
    frame: np.ndarray
    value: np.ndarray


def _eliminate(
    hessian: np.ndarray, gradient: np.ndarray, ties: _Ties, *, own: np.ndarray, ask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Solve for poses (k, 6) and points (n,): a few points at a time leave the frames that they touch."""
    order = np.argsort(ties.point, kind="stable")
    ties = _Ties(*(part[order] for part in ties))
    points, ask = len(own), ask.copy()
    bounds = np.searchsorted(ties.point, [*range(0, points, CHUNK), points])
    parts = []
    for low, start, stop in zip(range(0, points, CHUNK), bounds[:-1], bounds[1:], strict=True):
        if start == stop:
            continue
        high = min(low + CHUNK, points)
        frame = ties.frame[start:stop]
        first, last = int(frame.min()), int(frame.max()) + 1
        cube = np.zeros((high - low, last - first, 6))
        np.add.at(cube, (ties.point[start:stop] - low, frame - first), ties.value[start:stop])
        table = cube.reshape(high - low, -1)
        scaled = table / own[low:high, None]
        span = slice(6 * first, 6 * last)
        hessian[span, span] -= table.T @ scaled
        gradient[span] -= scaled.T @ ask[low:high]
        parts.append((slice(low, high), span, table))
    poses = np.linalg.solve(hessian, gradient)
    for rows, span, table in parts:
        ask[rows] -= table @ poses[span]
    return poses.reshape(-1, 6), ask / own


def _linearise(problem: Problem, state: State) -> _Linear:
    """Return residuals and their derivatives, sorted by frame and anchor."""
    anchor = problem.anchor[problem.track]
    key = problem.frame * len(state.rotation) + anchor
    order = np.argsort(key, kind="stable")
    key = key[order]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    first, second = key[starts] // len(state.rotation), key[starts] % len(state.rotation)
    rotation = state.rotation[first] @ np.swapaxes(state.rotation[second], 1, 2)
    shift = state.translation[first] - _apply(rotation, state.translation[second])
    pair = np.repeat(np.arange(len(starts)), np.diff([*starts, len(key)]))
    track = problem.track[order]
    inverse = state.inverse[track]
    point = _apply(rotation[pair], problem.ray[track]) + inverse[:, None] * shift[pair]
    depth = np.maximum(point[:, 2], 1e-3)
    plane = point[:, :2] / depth[:, None]
    certainty = problem.certainty[order]
    error = _apply(certainty, problem.pixel[order] - problem.focal * plane)
    camera = np.zeros((len(track), 2, 3))
    camera[:, [0, 1], [0, 1]] = problem.focal / depth[:, None]
    camera[:, :, 2] = -problem.focal * plane / depth[:, None]
    camera = certainty @ camera
    pose = np.concatenate([camera * inverse[:, None, None], -camera @ skew(point)], axis=2)
    adjoint = np.zeros((len(starts), 6, 6))
    adjoint[:, :3, :3] = adjoint[:, 3:, 3:] = rotation
    adjoint[:, :3, 3:] = skew(shift) @ rotation
    return _Linear(
        starts, order, first, second, adjoint, error, pose, np.einsum("mij,mj->mi", camera, shift[pair])
    )


def _moved(state: State, poses: np.ndarray, depths: np.ndarray, *, free: np.ndarray) -> State:
    """Apply a step: poses on the left, w2c <- exp(step) w2c."""
    rotation, translation = state.rotation.copy(), state.translation.copy()
    turn = exponential(poses[:, 3:])
    rotation[free] = orthonormal(turn @ rotation[free])
    translation[free] = _apply(turn, translation[free]) + poses[:, :3]
    inverse = np.where(depths == 0, state.inverse, np.maximum(state.inverse + depths, FARTHEST * state.prior))
    return state._replace(rotation=rotation, translation=translation, inverse=inverse)


def orthonormal(matrix: np.ndarray) -> np.ndarray:
    """Return the rotations nearest to matrices (n, 3, 3) that are almost rotations."""
    left, _, right = np.linalg.svd(matrix)
    return left @ right


def exponential(turn: np.ndarray) -> np.ndarray:
    """Return the rotations (n, 3, 3) about the axes (n, 3) by their lengths in radians (Rodrigues)."""
    angle = np.linalg.norm(turn, axis=1)[:, None, None]
    cross = skew(turn)
    safe = np.maximum(angle, 1e-12)
    sine = np.where(angle > 1e-8, np.sin(safe) / safe, 1.0)
    rest = np.where(angle > 1e-8, (1 - np.cos(safe)) / safe**2, 0.5)
    return np.eye(3) + sine * cross + rest * (cross @ cross)


def skew(vector: np.ndarray) -> np.ndarray:
    """Return the matrices (n, 3, 3) that take the cross product with vectors (n, 3)."""
    x, y, z = vector.T
    zero = np.zeros_like(x)
    return np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)


def _apply(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return np.einsum("nij,nj->ni", matrix, vector)
