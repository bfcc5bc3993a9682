import math
from itertools import pairwise, product

import pytest
import torch

from relic.ops.camera import rigid, rotation_from_angles
from relic.ops.covisibility import frustum_overlap, redundancy


def pose(*, pan: float = 0.0, tilt: float = 0.0, at: tuple[float, float, float] = (0, 0, 0)) -> torch.Tensor:
    angles = torch.tensor([pan, tilt, 0.0], dtype=torch.float64)
    return rigid(rotation_from_angles(angles), torch.tensor(at, dtype=torch.float64))


def overlap(*others: torch.Tensor, current: torch.Tensor) -> list[float]:
    return frustum_overlap(torch.stack(others), current, reach=(1.0, 0.6)).tolist()


def test_a_camera_sees_all_of_what_it_sees_and_nothing_of_what_lies_behind():
    assert overlap(pose(), pose(pan=180), current=pose()) == [1.0, 0.0]


def test_the_further_a_camera_turns_away_the_less_it_shares():
    shares = overlap(*(pose(pan=a) for a in (0, 20, 40, 60, 80)), current=pose())
    assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < shares[1] < 1


def test_a_quarter_turn_of_a_right_angled_view_leaves_nothing():
    assert overlap(pose(pan=91), pose(tilt=80), current=pose()) == [0.0, 0.0]


def test_only_the_relation_of_two_cameras_counts():
    moved = pose(pan=70, tilt=20, at=(30, -4, 11))
    a, b = pose(pan=15, at=(3, 0, 5)), pose(at=(-2, 1, 0))
    before, after = overlap(a, current=b), overlap(moved @ a, current=moved @ b)
    assert abs(before[0] - after[0]) < 0.01 and 0 < before[0] < 1


def test_stepping_aside_loses_what_is_near():
    shares = overlap(*(pose(at=(x, 0, 0)) for x in (0, 4, 16, 64)), current=pose())
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == 4


# -- redundancy ----------------------------------------------------------------------------------------------


def shown(*cameras: torch.Tensor) -> list[float]:
    return redundancy(torch.stack(cameras), reach=(1.0, 0.6)).tolist()


def test_a_pose_that_two_others_share_is_shown_whole_and_one_alone_not_at_all():
    assert shown(pose(), pose(), pose(), pose(pan=180)) == pytest.approx([1, 1, 1, 0], abs=1e-12)


def test_of_cameras_in_a_row_those_between_others_are_shown_best_and_those_at_a_gap_less():
    turned = [0, 10, 20, 30, 70, 80]
    shares = dict(zip(turned, shown(*(pose(pan=a) for a in turned)), strict=True))
    assert shares[10] == pytest.approx(shares[20])
    assert min(shares[10], shares[20]) > max(shares[0], shares[30]) > shares[70] > 0


def test_looking_at_a_place_from_the_other_side_does_not_show_it():
    there, back = pose(), pose(pan=180, at=(0, 0, 64))
    assert frustum_overlap(back[None], there, reach=(1.0, 0.6)).item() > 0.3
    assert shown(there, back) == [0.0, 0.0]


def test_a_camera_further_back_shows_a_view_less_than_one_nearby():
    near, far = (shown(pose(), pose(at=(0, 0, -back)))[0] for back in (2, 30))
    assert 0.5 > near > far > 0


def test_views_are_told_apart_without_steps():
    shares = [shown(pose(), pose(pan=a / 4))[0] for a in range(1, 40)]
    assert all(a > b for a, b in pairwise(shares))


def test_it_is_that_of_a_plain_loop_over_cameras_and_points():
    cameras = [pose(pan=a, tilt=a / 5, at=(a / 3, 0, -a / 7)) for a in (0.0, 25.0, 60.0, 95.0, 8.0)]
    shares = torch.zeros(5, 5, dtype=torch.float64)
    for i, own in enumerate(cameras):
        for j, other in enumerate(cameras):
            total = 0.0
            for z, y, x in product((8.0, 32.0, 128.0), range(4), range(6)):
                ray = torch.tensor([(2 * (x + 0.5) / 6 - 1), 0.6 * (2 * (y + 0.5) / 4 - 1), 1.0]).double() * z
                point = own[:3, :3] @ ray + own[:3, 3]
                sight, line = point - other[:3, 3], point - own[:3, 3]
                u, v, depth = (other[:3, :3].T @ sight).tolist()
                if i == j or depth <= 0:
                    continue
                within = [
                    min(max((r - abs(w) / depth) / c + 0.5, 0), 1)
                    for w, r, c in ((u, 1, 1 / 3), (v, 0.6, 0.3))
                ]
                cosine = max(float(sight @ line / (sight.norm() * line.norm())), 0)
                total += math.prod(within) * cosine * min(float(line.norm() / sight.norm()), 1)
            shares[j, i] = total / 72
    expected = shares.sort(dim=0).values[-2:].mean(0)
    assert shown(*cameras) == pytest.approx(expected.tolist())
