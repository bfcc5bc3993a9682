import pytest
import torch

from relic.metrics.pose import VisualOdometry, anchor_to
from relic.ops.actions import integrate, mirror_actions, parse_script
from relic.ops.camera import rigid, rotation_from_angles

ACTIONS = parse_script("pan_left*20 static*4 pan_right*20 dolly_in*6 dolly_out*6")


def elsewhere(c2w: torch.Tensor, *, scale: float) -> torch.Tensor:
    turn = rotation_from_angles(torch.tensor([10.0, 50.0, -30.0], dtype=torch.float64))
    return rigid(turn, torch.ones(3, dtype=torch.float64)) @ rigid(c2w[:, :3, :3], scale * c2w[:, :3, 3])


def test_an_estimate_in_another_world_and_scale_comes_to_lie_on_the_truth():
    truth = integrate(ACTIONS)
    assert torch.allclose(anchor_to(elsewhere(truth, scale=7.0), truth), truth, atol=1e-9)


def test_the_first_registered_frame_is_the_anchor_and_gaps_stay():
    truth = integrate(ACTIONS)
    estimated = elsewhere(truth, scale=0.1)
    estimated[[0, 1, 30]] = torch.nan
    laid = anchor_to(estimated, truth)
    assert laid.isnan().flatten(1).all(1).nonzero()[:, 0].tolist() == [0, 1, 30]
    kept = ~laid.isnan().flatten(1).any(1)
    assert torch.allclose(laid[kept], truth[kept], atol=1e-9)


def test_a_camera_that_turned_the_other_way_shows_as_such():
    truth = integrate(ACTIONS)
    laid = anchor_to(integrate(mirror_actions(ACTIONS)), truth)
    assert torch.allclose(laid[0], truth[0])
    assert torch.allclose(laid[44, :3, :3], truth[44, :3, :3], atol=1e-9), "both come back"
    assert (laid[20, :3, :3] - truth[20, :3, :3]).abs().max() > 0.9


def test_a_frozen_camera_stays_at_the_first_pose():
    truth = integrate(ACTIONS)
    laid = anchor_to(torch.eye(4, dtype=torch.float64).repeat(len(truth), 1, 1), truth)
    assert torch.allclose(laid, truth[:1].expand_as(laid))


def test_a_command_to_turn_gets_no_translation():
    truth = integrate(ACTIONS[:40])
    estimated = truth.clone()
    estimated[:, 0, 3] += torch.linspace(0, 1, len(truth))
    assert not anchor_to(estimated, truth)[:, :3, 3].any()


def test_an_estimate_of_nothing_is_an_estimate_of_nothing():
    truth = integrate(ACTIONS)
    assert anchor_to(torch.full_like(truth, torch.nan), truth).isnan().all()
    with pytest.raises(ValueError, match="for 57 true poses"):
        anchor_to(truth[:4], truth)


@pytest.mark.parametrize(
    ("intrinsics", "words"),
    [
        ([float("nan"), 60, 47.5, 31.5], "no camera"),
        ([60, -60, 47.5, 31.5], "no camera"),
        ([60, 60, 47.5, float("inf")], "no camera"),
        ([60, 60, 47.5], r"shape \(3,\)"),
    ],
)
def test_intrinsics_that_are_no_camera_are_named(intrinsics, words):
    video = torch.zeros(3, 64, 96, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=words):
        VisualOdometry().estimate(video, intrinsics_px=torch.tensor(intrinsics))


@pytest.mark.parametrize(
    "video",
    [
        torch.zeros(3, 64, 96, 3),
        torch.zeros(3, 3, 64, 96, dtype=torch.uint8),
        torch.zeros(0, 64, 96, 3, dtype=torch.uint8),
    ],
    ids=["float", "channels first", "no frame"],
)
def test_what_is_no_video_is_named(video):
    with pytest.raises(ValueError, match="must be \\(f, h, w, 3\\) uint8"):
        VisualOdometry().estimate(video, intrinsics_px=torch.tensor([60.0, 60, 47.5, 31.5]))
