import pytest
import torch

from relic.nn.control import RAY_FREQUENCIES, ControlConfig, ControlEncoders, group_frames
from relic.ops.actions import controls_of
from relic.ops.camera import ray_features

GRID = (2, 3)


def test_frames_are_grouped_as_the_autoencoder_groups_them():
    frames = torch.arange(9.0).reshape(1, 9, 1)
    grouped = group_frames(frames, starts_clip=True)
    assert grouped.tolist() == [[[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]]
    assert group_frames(frames[:, 1:], starts_clip=False).tolist() == [[[1, 2, 3, 4], [5, 6, 7, 8]]]


@pytest.mark.parametrize(
    ("frames", "starts_clip", "rule"), [(8, True, "4k[+]1"), (9, False, "multiple of 4")]
)
def test_other_numbers_of_frames_are_refused(frames, starts_clip, rule):
    with pytest.raises(ValueError, match=f"{frames} frames of control.*{rule}"):
        group_frames(torch.zeros(1, frames, 13), starts_clip=starts_clip)


@pytest.mark.parametrize("rays", [None, (0.8, 0.4)])
def test_a_later_block_is_encoded_as_it_is_inside_the_whole_clip(rays):
    encoders = ControlEncoders(ControlConfig(width=8, rays=rays))
    actions = torch.rand(1, 17, 13)
    controls = controls_of(actions)
    whole = encoders(controls, starts_clip=True, grid=GRID)
    later = controls._replace(actions=actions[:, 9:], poses=controls.poses[:, 9:])
    block = encoders(later, starts_clip=False, grid=GRID)
    assert whole.pose.shape == (1, 5, 6 if rays else 1, 8)
    torch.testing.assert_close(block.action, whole.action[:, 3:])
    torch.testing.assert_close(block.pose, whole.pose[:, 3:])


def test_without_poses_nothing_is_added_to_queries_and_keys():
    encoders = ControlEncoders(ControlConfig(width=8, poses=False))
    assert encoders(controls_of(torch.rand(1, 5, 13)), starts_clip=True, grid=GRID).pose is None


def test_rays_are_those_of_the_last_frame_of_a_latent():
    encoders = ControlEncoders(ControlConfig(width=8, rays=(0.8, 0.4)))
    controls = controls_of(torch.rand(1, 5, 13) / 20)
    whole = encoders(controls, starts_clip=True, grid=GRID).pose[:, 1]
    seen = ray_features(
        controls.poses[:, 4], rows=2, columns=3, reach=(0.8, 0.4), frequencies=RAY_FREQUENCIES
    )  # fmt: skip
    poses = controls.poses[:, 1:].flatten(1)[:, None].expand(-1, 6, -1)
    torch.testing.assert_close(whole, encoders.pose(torch.cat([poses, seen], dim=-1)))


def test_every_token_has_a_ray_of_its_own():
    torch.manual_seed(0)
    encoders = ControlEncoders(ControlConfig(width=8, rays=(0.8, 0.4)))
    turned = torch.zeros(1, 5, 13)
    turned[:, 1:, 3:] = torch.rand(10) / 20
    states = encoders(controls_of(turned), starts_clip=True, grid=GRID)
    assert (states.pose[0, 0] - states.pose[0, 0, :1]).abs().max(-1).values[1:].min() > 1e-4  # each its own
    still = encoders(controls_of(torch.zeros(1, 9, 13)), starts_clip=True, grid=GRID)
    torch.testing.assert_close(still.pose[:, 1], still.pose[:, 2])
    assert (states.pose[:, 1] - still.pose[:, 1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "rule"),
    [({"rays": (0.8,)}, "two positive"), ({"rays": (0.8, 0.0)}, "two positive"),
     ({"rays": (0.8, 0.4), "poses": False}, "poses=True")],
)  # fmt: skip
def test_rays_that_are_no_view_are_refused(settings, rule):
    with pytest.raises(ValueError, match=rule):
        ControlConfig(**settings)
