import pytest
import torch

from relic.ops.actions import controls_of, integrate
from relic.ops.camera import pose_features
from relic.ops.odometry import Odometry, advance


def walk(actions: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    odometry, poses = Odometry.origin(len(actions)), []
    for stretch in actions.split(sizes, dim=1):
        odometry, c2w = advance(odometry, stretch)
        poses.append(c2w)
    return torch.cat(poses, dim=1)


@pytest.mark.parametrize(
    "sizes",
    [[1, *[16] * 40], [641], [1, *[8] * 80], [256, 256, 129], [255, 2, 384], [1] * 641],
    ids=["seconds", "whole", "half seconds", "stretches", "across stretches", "frames"],
)
def test_poses_are_those_of_the_whole_stream_however_it_is_cut(sizes):
    actions = torch.rand(2, 641, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = integrate(actions)
    poses = walk(actions, sizes)
    assert torch.equal(poses, whole)
    assert torch.equal(pose_features(poses), controls_of(actions).poses)


def test_the_state_of_a_stream_stays_small():
    odometry = Odometry.origin(1)
    for _ in range(100):
        odometry, _ = advance(odometry, torch.rand(1, 16, 13))
        assert odometry.motion.shape[1] < 256
