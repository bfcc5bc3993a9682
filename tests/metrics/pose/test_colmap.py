import pytest
import torch

from relic.metrics.pose import Pycolmap


def test_poses_by_structure_from_motion():
    pytest.importorskip("pycolmap")
    pytest.importorskip("panda3d")
    from relic.metrics.trajectory_error import relative_pose_error
    from tests.metrics.pose.clips import clip

    film = clip("truck_left*12 truck_right*12")
    found = Pycolmap().estimate(film.video, intrinsics_px=film.intrinsics_px)
    errors = relative_pose_error(found.c2w, film.c2w, delta=8, d_bar=film.d_bar)
    assert errors.trans[errors.valid].mean() < 0.8


def test_a_bad_video_is_named_before_anything_is_imported():
    with pytest.raises(ValueError, match="must be"):
        Pycolmap().estimate(torch.zeros(3, 4, 4, 3), intrinsics_px=torch.ones(4))
