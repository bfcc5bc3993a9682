import numpy as np
import pytest

from relic.metrics.pose.bundle import Problem, State, adjust, cost, exponential, residuals, seen_from

FINE = {"soft": 0.2, "pull": 0.0}


def scene(*, seed: int = 0, frames: int = 6, points: int = 60) -> tuple[Problem, State]:
    """Points seen without error by cameras that move and turn."""
    draw = np.random.default_rng(seed)
    rotation = exponential(np.concatenate([np.zeros((1, 3)), draw.normal(0, 0.08, (frames - 1, 3))]))
    translation = np.concatenate([np.zeros((1, 3)), draw.normal(0, 0.2, (frames - 1, 3))])
    anchor = np.sort(draw.integers(0, 3, points))
    ray = np.concatenate([draw.uniform(-0.6, 0.6, (points, 2)), np.ones((points, 1))], axis=1)
    track, frame = (a.ravel() for a in np.meshgrid(np.arange(points), np.arange(frames)))
    kept = frame > anchor[track]
    track, frame = track[kept], frame[kept]
    certainty = np.tile(np.eye(2), (len(track), 1, 1))
    focal = np.array([160.0, 150.0])
    problem = Problem(ray, anchor, frame, track, np.zeros((len(track), 2)), certainty, focal)
    state = State(rotation, translation, draw.uniform(0.2, 1.0, points), np.full(points, 0.5))
    return problem._replace(pixel=-residuals(problem, state)), state


def disturbed(state: State, *, seed: int = 1) -> State:
    draw = np.random.default_rng(seed)
    turn = exponential(np.concatenate([np.zeros((1, 3)), draw.normal(0, 0.02, (len(state.rotation) - 1, 3))]))
    shift = np.concatenate([np.zeros((1, 3)), draw.normal(0, 0.02, (len(state.rotation) - 1, 3))])
    factor = np.exp(draw.normal(0, 0.1, len(state.inverse)))
    return State(turn @ state.rotation, state.translation + shift, state.inverse * factor, state.prior)


def test_a_disturbed_scene_comes_back_but_for_its_scale():
    problem, true = scene()
    found = disturbed(true)
    assert np.abs(residuals(problem, found)).max() > 1
    for soft in (8.0, 0.2):
        found = adjust(problem, found, free=np.arange(6) > 0, iterations=40, soft=soft)
    assert np.abs(residuals(problem, found)).max() < 1e-3
    scale = np.median(true.inverse / found.inverse)
    assert np.allclose(found.rotation, true.rotation, atol=1e-5)
    assert np.allclose(found.translation, scale * true.translation, atol=1e-4)


def test_frames_that_are_not_free_stay_and_depths_stay_where_they_are_not_asked_for():
    problem, true = scene()
    start = disturbed(true)
    free = np.arange(6) == 4
    found = adjust(problem, start, free=free, iterations=10, soft=1.0, deep=False)
    assert np.array_equal(found.rotation[~free], start.rotation[~free])
    assert np.array_equal(found.inverse, start.inverse)
    assert cost(problem, found, soft=1.0, pull=0.0) < cost(problem, start, soft=1.0, pull=0.0)


def test_points_at_infinity_stay_there_and_give_no_translation():
    problem, true = scene()
    far = true._replace(inverse=np.zeros_like(true.inverse), translation=np.zeros_like(true.translation))
    problem = problem._replace(pixel=problem.pixel + residuals(problem, true) - residuals(problem, far))
    start = disturbed(far)._replace(translation=far.translation)
    found = adjust(problem, start, free=np.arange(6) > 0, iterations=20, soft=1.0, deep=False)
    assert not found.inverse.any()
    assert np.abs(found.translation).max() < 1e-12


def test_a_few_wild_sightings_do_not_matter():
    problem, true = scene()
    pixel = problem.pixel.copy()
    pixel[::17] += 25.0
    found = adjust(
        problem._replace(pixel=pixel), disturbed(true), free=np.arange(6) > 0, iterations=60, **FINE
    )
    assert np.median(np.abs(residuals(problem, found))) < 0.02


def test_an_error_along_an_edge_weighs_nothing():
    problem, true = scene()
    across = np.tile(np.diag([1.0, 0.0]), (len(problem.track), 1, 1))
    slid = problem._replace(pixel=problem.pixel + np.array([0.0, 3.0]), certainty=across)
    assert np.abs(residuals(slid, true)).max() < 1e-9


def test_depth_is_carried_to_another_frame():
    problem, true = scene()
    rows = problem.frame == 5
    seen = problem._replace(
        frame=problem.frame[rows], track=problem.track[rows], pixel=problem.pixel[rows],
        certainty=problem.certainty[rows],
    )  # fmt: skip
    inverse, _ = seen_from(seen, true, frame=5)
    point = 0
    track = seen.track[point]
    anchor = problem.anchor[track]
    world = true.rotation[anchor].T @ (problem.ray[track] / true.inverse[track] - true.translation[anchor])
    depth = (true.rotation[5] @ world + true.translation[5])[2]
    assert inverse[point] == pytest.approx(1 / depth)


def test_a_pose_that_nothing_sees_stays_where_it_is():
    problem, true = scene()
    seen = problem.frame != 4
    part = problem._replace(
        frame=problem.frame[seen], track=problem.track[seen], pixel=problem.pixel[seen],
        certainty=problem.certainty[seen],
    )  # fmt: skip
    start = disturbed(true)
    found = adjust(part, start, free=np.arange(6) > 0, iterations=20, soft=1.0)
    assert np.allclose(found.translation[4], start.translation[4], atol=1e-6)
    assert np.abs(residuals(part, found)).max() < 1e-2 < np.abs(residuals(part, start)).max()
