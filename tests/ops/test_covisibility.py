import torch

from relic.ops.camera import rigid, rotation_from_angles
from relic.ops.covisibility import frustum_overlap


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
