import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from relic.metrics.pose import PoseEstimate
from relic.metrics.trajectory_error import (
    ActionError,
    TooFewSteps,
    absolute_trajectory_error,
    action_buckets,
    align,
    estimator_floor,
    mind_errors,
    relative_pose_error,
)
from relic.ops.actions import integrate, mirror_actions, parse_script
from relic.ops.camera import rigid, rotation_from_angles
from relic.types import Clip
from tests.reference.trajectory import aligned, relative_errors, trajectory_error

SCRIPT = "dolly_in*12 pan_left*10 truck_right+tilt_up*12 static*4 pedestal_up*8 roll_cw*6"


def commanded(script: str = SCRIPT) -> tuple[torch.Tensor, torch.Tensor]:
    actions = parse_script(script)
    return integrate(actions), actions


def noisy(c2w: torch.Tensor, *, seed: int = 0, angle_deg: float = 1.0, step: float = 0.1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    turn = rotation_from_angles(angle_deg * torch.randn(len(c2w), 3, generator=draw, dtype=torch.float64))
    shift = step * torch.randn(len(c2w), 3, generator=draw, dtype=torch.float64)
    return c2w @ rigid(turn, shift)


def moved(c2w: torch.Tensor, *, scale: float) -> torch.Tensor:
    """The same path in another world and of another size."""
    angles = torch.tensor([40.0, -20.0, 70.0], dtype=torch.float64)
    world = rigid(rotation_from_angles(angles), torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64))
    return world @ rigid(c2w[:, :3, :3], scale * c2w[:, :3, 3])


@pytest.mark.parametrize("delta", [1, 8])
@pytest.mark.parametrize("gaps", [(), (0, 7, 20, 21)])
def test_errors_equal_a_plain_implementation(delta, gaps):
    truth, _ = commanded()
    estimated = moved(noisy(truth), scale=3.0)
    estimated[list(gaps)] = torch.nan
    errors = relative_pose_error(estimated, truth, delta=delta)
    rows = relative_errors(estimated.numpy(), truth.numpy(), delta)
    assert errors.valid.nonzero()[:, 0].tolist() == [row[0] for row in rows]
    assert np.allclose(errors.trans[errors.valid], [row[1] for row in rows], atol=1e-9)
    assert np.allclose(errors.rot_deg[errors.valid], [row[2] for row in rows], atol=1e-6)
    assert np.allclose(align(estimated, truth), aligned(estimated.numpy(), truth.numpy()), equal_nan=True)
    ate = float(absolute_trajectory_error(estimated, truth))
    assert ate == pytest.approx(trajectory_error(estimated.numpy(), truth.numpy()))


def test_world_and_scale_of_an_estimate_do_not_count():
    truth, _ = commanded()
    errors = relative_pose_error(moved(truth, scale=0.2), truth, delta=1)
    assert errors.trans.max() < 1e-9
    assert errors.rot_deg.max() < 1e-6


def test_half_the_turn_is_half_a_turn_of_error():
    truth, actions = commanded("pan_right*20")
    half = integrate(actions / 2)
    errors = relative_pose_error(half, truth, delta=1)
    assert errors.rot_deg.tolist() == pytest.approx([1.0] * 20)
    assert relative_pose_error(half, truth, delta=8).rot_deg.tolist() == pytest.approx([8.0] * 13)


def test_the_opposite_way_costs_two_steps():
    truth, actions = commanded("truck_left*20")
    errors = relative_pose_error(integrate(mirror_actions(actions)), truth, delta=1)
    assert errors.trans.tolist() == pytest.approx([2.0] * 20)


def test_translations_are_in_mean_steps_where_they_are_given():
    truth, _ = commanded()
    estimated = noisy(truth)
    metres = rigid(truth[:, :3, :3], 0.05 * truth[:, :3, 3])
    assert torch.allclose(
        relative_pose_error(estimated, metres, delta=1, d_bar=0.05).trans,
        relative_pose_error(estimated, truth, delta=1).trans,
    )


def test_a_camera_that_stands_still_misses_every_step_whole():
    truth, _ = commanded("dolly_in*20")
    still = torch.eye(4, dtype=torch.float64).repeat(21, 1, 1)
    assert relative_pose_error(still, truth, delta=1).trans.tolist() == pytest.approx([1.0] * 20)
    assert float(absolute_trajectory_error(still, truth)) == pytest.approx(np.arange(21).std())


def test_a_path_that_only_turns_has_rotation_and_no_translation():
    truth, actions = commanded("pan_left*20")
    errors = relative_pose_error(noisy(truth), truth, delta=1)
    assert errors.trans.isnan().all()
    assert not errors.rot_deg.isnan().any()
    assert absolute_trajectory_error(noisy(truth), truth).isnan()
    metric = ActionError()
    metric.update(noisy(truth), truth, actions=actions)
    scores = metric.compute()
    assert scores["action/rpe_trans"].isnan()
    assert scores["action/ate"].isnan()
    assert scores["action/rpe_rot_deg/pan_left"] > 0
    assert "action/rpe_trans/pan_left" not in scores


def test_too_few_steps_are_an_error_that_counts_them():
    truth, _ = commanded("dolly_in*20")
    estimated = truth.clone()
    estimated[8:] = torch.nan
    with pytest.raises(TooFewSteps, match="7 of 20 motions over 1 frames"):
        relative_pose_error(estimated, truth, delta=1)
    with pytest.raises(TooFewSteps, match="8 of 21 frames"):
        absolute_trajectory_error(estimated, truth)
    with pytest.raises(TooFewSteps, match="0 of 2 motions"):
        relative_pose_error(torch.full((10, 4, 4), torch.nan), truth[:10], delta=8)


def test_bad_input_is_named():
    truth, actions = commanded()
    with pytest.raises(ValueError, match=r"shape \(10, 4, 4\) for 53 true poses"):
        relative_pose_error(truth[:10], truth, delta=1)
    skewed = truth.clone()
    skewed[3, 0, 0] += 0.5
    with pytest.raises(ValueError, match=r"estimated c2w.* is not rigid"):
        relative_pose_error(skewed, truth, delta=1)
    with pytest.raises(ValueError, match=r"truth.* is not rigid"):
        relative_pose_error(truth, skewed, delta=1)
    holed = truth.clone()
    holed[5, 0, 3] = torch.nan
    with pytest.raises(ValueError, match="pose 5 is partly NaN"):
        relative_pose_error(holed, truth, delta=1)
    with pytest.raises(ValueError, match=r"truth\[5\] holds NaN"):
        relative_pose_error(truth, holed, delta=1)
    with pytest.raises(ValueError, match="delta=0"):
        relative_pose_error(truth, truth, delta=0)
    with pytest.raises(ValueError, match="53 poses need"):
        ActionError().update(truth, truth, actions=actions[:5])


def test_motions_fall_into_the_buckets_of_their_actions():
    _, actions = commanded("dolly_in*9 pan_left*9 dolly_in+roll_ccw*9 static*9")
    buckets = action_buckets(actions, delta=1)
    parts = {"translation": (0, 9), "rotation": (9, 18), "combined": (18, 27), "still": (27, 36)}
    for name, (start, stop) in parts.items():
        assert buckets[name].nonzero()[:, 0].tolist() == list(range(start, stop)), name
    assert int(buckets["dolly_in"].sum()) == 18
    assert int(buckets["roll_ccw"].sum()) == 9
    assert not buckets["roll_cw"].any()
    assert len(action_buckets(actions, delta=8)["still"]) == len(actions) - 8


def test_actions_are_read_from_the_truth_where_they_are_not_given():
    truth, actions = commanded()
    given, read = ActionError(), ActionError()
    given.update(noisy(truth), truth, actions=actions)
    read.update(noisy(truth), truth)
    assert given.compute().keys() == read.compute().keys()
    for name, score in given.compute().items():
        assert torch.allclose(score, read.compute()[name], equal_nan=True), name


def test_the_metric_is_the_mean_over_all_motions_and_tells_coverage():
    first, _ = commanded()
    second, _ = commanded("truck_left*15 pan_left*15")
    found = noisy(second, seed=1)
    found[20:] = torch.nan
    metric = ActionError()
    metric.update(noisy(first), first, floor=first)
    metric.update(found, second, floor=second)
    errors = [relative_pose_error(noisy(first), first, delta=8), relative_pose_error(found, second, delta=8)]
    scores = metric.compute()
    expected = torch.cat([error.rot_deg[error.valid] for error in errors]).mean()
    assert torch.allclose(scores["action/rpe_rot_deg_8"], expected)
    assert float(scores["action/coverage"]) == pytest.approx((53 + 20) / (53 + 31))
    assert float(scores["action/coverage_floor"]) == 1
    assert float(scores["action/ate_floor"]) < 1e-9
    assert {name + "_floor" for name in scores if name != "action/unscored" and "floor" not in name} <= set(
        scores
    )


def test_a_clip_without_poses_counts_in_coverage_alone():
    truth, _ = commanded()
    metric = ActionError()
    metric.update(torch.full((53, 4, 4), torch.nan, dtype=torch.float64), truth)
    scores = metric.compute()
    assert int(scores["action/unscored"]) == 1
    assert float(scores["action/coverage"]) == 0
    assert math.isnan(float(scores["action/rpe_rot_deg"]))


class Oracle:
    """An estimator that knows the answer but for noise."""

    def __init__(self, c2w: torch.Tensor) -> None:
        self.c2w = c2w

    def estimate(self, video: torch.Tensor, *, intrinsics_px: torch.Tensor) -> PoseEstimate:
        return PoseEstimate(self.c2w, torch.ones(len(video), dtype=torch.bool))


def test_the_floor_of_an_estimator_is_its_error_on_true_video():
    truth, _ = commanded()
    video = torch.zeros(53, 16, 16, 3, dtype=torch.uint8)
    clip = Clip(video, truth, torch.tensor([8.0, 8, 7.5, 7.5]), fps=16.0, d_bar=1.0)
    floor = estimator_floor([clip], Oracle(noisy(truth)))
    metric = ActionError()
    metric.update(noisy(truth), truth)
    assert torch.equal(floor["action/rpe_trans_8"], metric.compute()["action/rpe_trans_8"])


# MIND

NAMES = ["forward"] * 20 + ["look_left"] * 20 + ["forward+look_left"] * 20 + ["no_op"] * 60


def mind_paths() -> tuple[torch.Tensor, torch.Tensor]:
    truth, _ = commanded("dolly_in*20 pan_left*20 dolly_in+pan_left*20 static*60")
    return moved(noisy(truth), scale=2.0), truth


def test_mind_sees_97_frames_and_its_own_buckets():
    estimated, truth = mind_paths()
    scores = mind_errors(estimated, truth, actions=NAMES)
    rows = relative_errors(estimated[:97].numpy(), truth[:97].numpy(), 1)
    assert scores["__overall__"]["count"] == 96
    assert scores["__overall__"]["rpe_trans_mean"] == pytest.approx(np.mean([row[1] for row in rows]))
    assert scores["__overall__"]["rpe_rot_median_deg"] == pytest.approx(np.median([row[2] for row in rows]))
    assert scores["translation"]["count"] == 20
    assert "rotation" not in scores, "its names of turns are not those its bucket knows"
    assert scores["other"]["count"] == 76
    assert scores["act:look_left"]["rpe_rot_mean_deg"] == pytest.approx(
        np.mean([row[2] for row in rows[20:40]])
    )


def test_mind_drops_motions_that_are_off_by_half_a_turn():
    estimated, truth = mind_paths()
    flip = rotation_from_angles(torch.tensor([179.9, 0.0, 0.0], dtype=torch.float64))
    estimated = truth.clone()
    estimated[10:, :3, :3] = estimated[10:, :3, :3] @ flip
    assert mind_errors(estimated, truth, actions=NAMES)["__overall__"]["count"] == 95
    with pytest.raises(TooFewSteps, match="5 motions"):
        mind_errors(truth[:6], truth[:6], actions=NAMES)
    estimated[3] = torch.nan
    with pytest.raises(ValueError, match="frame 3 is not registered"):
        mind_errors(estimated, truth, actions=NAMES)


PROCESS = """
import sys, torch, torch.distributed as dist
from tests.metrics.test_trajectory_error import ActionError, commanded, noisy
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
metric = ActionError()
if rank == 0:  # the other has no clip
    for seed in range(2):
        truth, actions = commanded()
        metric.update(noisy(truth, seed=seed), truth, actions=actions, floor=truth)
torch.save(metric.compute(), f"{sys.argv[3]}/{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    address = f"file://{tmp_path}/rendezvous"
    words = [[sys.executable, "-c", PROCESS, str(rank), address, str(tmp_path)] for rank in range(2)]
    for process in [subprocess.Popen(word) for word in words]:
        assert process.wait(timeout=120) == 0
    metric = ActionError()
    for seed in range(2):
        truth, actions = commanded()
        metric.update(noisy(truth, seed=seed), truth, actions=actions, floor=truth)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, score in metric.compute().items():
            assert torch.allclose(found[name], score, equal_nan=True), name
