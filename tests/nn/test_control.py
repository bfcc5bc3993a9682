import pytest
import torch

from relic.nn.control import ControlConfig, ControlEncoders, group_frames
from relic.ops.actions import controls_of


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


def test_a_later_block_is_encoded_as_it_is_inside_the_whole_clip():
    encoders = ControlEncoders(ControlConfig(width=8))
    actions = torch.rand(1, 17, 13)
    controls = controls_of(actions)
    whole = encoders(controls, starts_clip=True)
    block = encoders(
        controls._replace(actions=actions[:, 9:], poses=controls.poses[:, 9:]), starts_clip=False
    )
    torch.testing.assert_close(block.action, whole.action[:, 3:])
    torch.testing.assert_close(block.pose, whole.pose[:, 3:])


def test_without_poses_nothing_is_added_to_queries_and_keys():
    encoders = ControlEncoders(ControlConfig(width=8, poses=False))
    assert encoders(controls_of(torch.rand(1, 5, 13)), starts_clip=True).pose is None
