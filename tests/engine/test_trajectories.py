"""Paths are rigid, smooth, free of collisions, balanced over the axes, and come back to what they saw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relic.engine.building import make_scene
from relic.engine.space import CLEARANCE, FreeSpace
from relic.engine.trajectories import make_trajectory
from relic.engine.walker import Walker, angles_of, turned
from relic.ops.actions import CHANNELS, KEY_TURN_DEG, encode_actions, mean_step
from relic.ops.camera import angles_from_rotation, check_rigid, rotation_from_angles, turn_deg

FPS = 16.0


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_paths_are_rigid_smooth_and_free(seed: int) -> None:
    scene = make_scene(seed)
    c2w = make_trajectory(scene, seed=seed, frames=400, fps=FPS)
    assert c2w.shape == (400, 4, 4)
    assert c2w.dtype == torch.float64
    check_rigid(c2w, tolerance=1e-9)
    assert FreeSpace(scene).gaps(c2w[:, :3, 3].T.numpy()).min() >= CLEARANCE
    steps = c2w[1:, :3, 3] - c2w[:-1, :3, 3]
    assert steps.norm(dim=-1).max() * FPS < 2.5  # m/s: three axes at once
    assert turn_deg(c2w[:-1, :3, :3].mT @ c2w[1:, :3, :3]).max() * FPS < 85
    jolt = (steps[1:] - steps[:-1]).norm(dim=-1) * FPS
    assert jolt.quantile(0.99) < 0.4  # m/s within a frame
    _, tilt, roll = angles_from_rotation(c2w[:, :3, :3]).abs().amax(0).tolist()
    assert tilt < 70
    assert roll < 70


def test_a_path_is_a_function_of_scene_and_seed() -> None:
    scene = make_scene(1)
    first = make_trajectory(scene, seed=3, frames=60)
    assert torch.equal(first, make_trajectory(make_scene(1), seed=3, frames=60))
    assert not torch.equal(first, make_trajectory(scene, seed=4, frames=60))
    assert torch.equal(first[:30], make_trajectory(scene, seed=3, frames=30)), "longer goes on"


@pytest.fixture(scope="module")
def paths() -> list[Tensor]:
    return [make_trajectory(make_scene(11, index), seed=0, frames=640, fps=FPS) for index in range(8)]


def test_all_axes_are_used_in_balance(paths: list[Tensor]) -> None:
    total = torch.zeros(len(CHANNELS), dtype=torch.float64)
    for c2w in paths:
        actions = encode_actions(c2w, d_bar=mean_step(c2w)[0]).sum(0)
        actions[6:12] /= KEY_TURN_DEG
        total += actions
    shares = dict(zip(CHANNELS, (total / total.sum()).tolist(), strict=True))
    assert max(shares.values()) < 0.306, shares  # the share of the largest action in the paper's data
    assert min(shares.values()) > 0.015, shares


def seen_again(c2w: Tensor) -> float:
    """Share of looks, one a second, near an earlier view (0.5 m, 20 degrees) after 2 s or more away."""
    looks = c2w[:: int(FPS)]
    far = torch.cdist(looks[:, :3, 3], looks[:, :3, 3])
    turns = turn_deg(looks[:, None, :3, :3].mT @ looks[None, :, :3, :3])
    near = (far < 0.5) & (turns < 20)
    count = 0
    for now in range(len(looks)):
        away = (~near[now, :now]).nonzero().flatten()
        count += bool(len(away) >= 2 and near[now, : int(away[-2])].any())
    return count / len(looks)


def test_paths_come_back(paths: list[Tensor]) -> None:
    shares = [seen_again(c2w) for c2w in paths]
    assert np.mean(shares) > 0.1, shares
    assert np.mean([share > 0 for share in shares]) >= 0.8, shares


def test_paths_go_through_doorways(paths: list[Tensor]) -> None:
    def rooms(index: int, c2w: Tensor) -> int:
        return sum(room.holds(c2w[:, :3, 3].numpy()).any() for room in make_scene(11, index).rooms)

    assert np.mean([rooms(index, c2w) for index, c2w in enumerate(paths)]) >= 2


def test_a_walker_stops_before_a_wall_and_retraces_its_way() -> None:
    scene = make_scene(0)
    space = FreeSpace(scene)
    start = torch.eye(4, dtype=torch.float64).numpy()
    start[:3, 3] = space.place(
        np.random.default_rng(0), low=np.array(scene.rooms[0].low), high=np.array(scene.rooms[0].high)
    )
    walker = Walker(space, start, fps=FPS)
    for _ in range(200):
        walker.move(np.array([0.3, 0.0, 1.4, 0.0, 0.0, 0.0]))
    assert space.gap(walker.position) >= CLEARANCE
    assert np.linalg.norm(walker.poses[-1][:3, 3] - walker.poses[-20][:3, 3]) < 0.05, "it has come to a stop"
    out = len(walker.poses)
    walker.retrace(0)
    assert np.array_equal(np.stack(walker.poses[out:]), np.stack(walker.poses[: out - 1])[::-1])


@given(angles=st.tuples(*[st.floats(-80, 80)] * 3))
def test_the_fast_rotation_is_the_librarys(angles: tuple[float, float, float]) -> None:
    expected = rotation_from_angles(torch.tensor(angles, dtype=torch.float64)).numpy()
    assert np.abs(turned(*np.radians(angles).tolist()) - expected).max() < 1e-12
    assert np.abs(np.array(angles_of(expected)) - angles).max() < 1e-6
