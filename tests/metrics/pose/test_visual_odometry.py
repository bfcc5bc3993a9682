import pytest
import torch

from relic.metrics.pose import VisualOdometry
from relic.metrics.pose.estimator import PoseEstimate
from relic.metrics.trajectory_error import ActionError, absolute_trajectory_error, relative_pose_error
from relic.types import Clip

pytest.importorskip("cv2")
pytest.importorskip("panda3d")

from tests.metrics.pose.clips import clip


def estimate(clip: Clip) -> PoseEstimate:
    return VisualOdometry().estimate(clip.video, intrinsics_px=clip.intrinsics_px)


def test_steps_and_turns_are_found():
    film = clip("truck_left*12 truck_right*12")
    found = estimate(film)
    assert found.registered.all()
    assert found.c2w.dtype == torch.float64
    errors = relative_pose_error(found.c2w, film.c2w, delta=8, d_bar=film.d_bar)
    assert errors.trans.mean() < 0.08 * 8, "8 in 100 of the way"
    assert errors.rot_deg.mean() < 0.4
    assert absolute_trajectory_error(found.c2w, film.c2w, d_bar=film.d_bar) < 0.5


def test_a_camera_that_only_turns_is_found_to_turn_and_not_to_move():
    film = clip("pan_left*16", scene=3)
    found = estimate(film)
    errors = relative_pose_error(found.c2w, film.c2w, delta=8)
    assert errors.rot_deg.mean() < 0.1, "of 16 degrees"
    assert not found.c2w[:, :3, 3].any()


def test_mirrored_actions_are_told_from_true_ones():
    film = clip("truck_left*12 truck_right*12")
    opposite = clip("truck_right*12 truck_left*12")
    scores = {}
    for name, shown in (("true", film), ("mirrored", opposite)):
        metric = ActionError()
        metric.update(estimate(shown).c2w, film.c2w, d_bar=film.d_bar)
        scores[name] = metric.compute()["action/rpe_trans_8"]
    assert scores["true"] < 0.8
    assert scores["mirrored"] > 8


def test_scale_is_that_of_the_first_motion():
    positions = estimate(clip("dolly_out*12")).c2w[:, :3, 3]
    assert torch.isclose((positions[1:] - positions[:-1]).norm(dim=1), torch.tensor(1.0).double()).any()


def test_the_same_video_gives_the_same_poses():
    film = clip("dolly_out*12")
    assert torch.equal(estimate(film).c2w, estimate(film).c2w)


def test_a_reduced_picture_keeps_its_pixel_centres():
    film = clip("pan_left*16", scene=3)
    video = film.video.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    fx, fy, cx, cy = film.intrinsics_px
    larger = torch.stack([4 * fx, 4 * fy, 4 * (cx + 0.5) - 0.5, 4 * (cy + 0.5) - 0.5])
    found = VisualOdometry().estimate(video, intrinsics_px=larger)
    assert relative_pose_error(found.c2w, film.c2w, delta=8).rot_deg.mean() < 0.15


def test_a_black_video_is_not_registered():
    film = clip("dolly_out*12")
    found = estimate(film._replace(video=torch.zeros_like(film.video)))
    assert not found.registered.any()
    assert found.c2w.isnan().all()


@pytest.mark.parametrize("noise", [0, 2])
def test_a_frozen_video_is_registered_and_stands_still(noise):
    film = clip("dolly_out*12")
    flicker = torch.randint(0, noise + 1, film.video.shape, generator=torch.Generator().manual_seed(0))
    frozen = (film.video[:1].int() + flicker).clamp(max=255).to(torch.uint8)
    found = estimate(film._replace(video=frozen))
    assert found.registered.all()
    off = (found.c2w - torch.eye(4)).abs().max()
    assert off < (2e-3 if noise else 1e-6)


def test_a_flash_leaves_out_its_frame_alone():
    film = clip("truck_left*12 truck_right*12")
    video = film.video.clone()
    video[9] = 255
    found = estimate(film._replace(video=video))
    assert found.registered.nonzero()[:, 0].tolist() == [i for i in range(25) if i != 9]
    errors = relative_pose_error(found.c2w, film.c2w, delta=8, d_bar=film.d_bar)
    assert errors.trans[errors.valid].mean() < 0.8


def test_after_a_cut_nothing_is_registered():
    film = clip("truck_left*12 truck_right*12")
    video = film.video.clone()
    video[12:] = clip("truck_left*12 truck_right*12", scene=7).video[12:]
    found = estimate(film._replace(video=video))
    assert found.registered[:12].all()
    assert found.registered[12:].sum() <= 2


def test_noise_is_not_registered_beyond_its_first_frame():
    video = torch.randint(
        0, 256, (10, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = VisualOdometry().estimate(video, intrinsics_px=torch.tensor([60.0, 60, 47.5, 31.5]))
    assert found.registered.sum() <= 2


def test_one_frame_has_the_pose_of_the_origin():
    film = clip("dolly_out*12")
    found = estimate(film._replace(video=film.video[:1]))
    assert torch.equal(found.c2w[0], torch.eye(4, dtype=torch.float64))


def test_a_video_of_noise_loses_its_scale_and_says_so():
    draw = torch.Generator().manual_seed(3)
    coarse = torch.rand(120, 3, 8, 12, generator=draw)
    slow = torch.stack([coarse[max(0, i - 6) : i + 1].mean(0) for i in range(120)])  # lasts a few frames
    video = torch.nn.functional.interpolate(slow, size=(64, 96), mode="bilinear")
    video = (255 * video).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    intrinsics = torch.tensor([60.0, 60.0, 47.5, 31.5], dtype=torch.float64)
    found = VisualOdometry().estimate(video, intrinsics_px=intrinsics)
    assert found.registered[0] and torch.isfinite(found.c2w[found.registered]).all()
    assert found.c2w[~found.registered].isnan().all()
