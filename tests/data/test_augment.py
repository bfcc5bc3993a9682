from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relic.data.augment import draw_pivot, palindrome_indices, stride_between, window_actions
from relic.ops.actions import encode_actions, integrate, mirror_actions
from tests.data.recordings import smooth_path

windows = st.integers(1, 200).flatmap(
    lambda frames: st.tuples(st.just(frames), st.integers((frames + 2) // 2, frames))
)


@given(windows)
def test_a_palindrome_has_all_its_frames_inside_the_window(window: tuple[int, int]) -> None:
    num_frames, pivot = window
    indices = palindrome_indices(num_frames, pivot)
    assert len(indices) == num_frames
    assert indices.min() == 0 or num_frames == 1
    assert indices.max() == pivot - 1
    assert indices.tolist()[:pivot] == list(range(pivot))


@given(windows)
def test_a_palindrome_moves_one_frame_at_a_time_and_mirrors_about_the_pivot(window: tuple[int, int]) -> None:
    num_frames, pivot = window
    indices = palindrome_indices(num_frames, pivot)
    assert torch.all((indices[1:] - indices[:-1]).abs() == 1)
    for away in range(num_frames - pivot + 1):
        assert indices[pivot - 1 + away] == indices[pivot - 1 - away]
    assert indices[-1] == 2 * pivot - num_frames - 1  # f_{2t*-T}, counted from 1


@given(windows)
def test_a_full_pivot_changes_nothing(window: tuple[int, int]) -> None:
    assert torch.equal(palindrome_indices(window[0], window[0]), torch.arange(window[0]))


@given(st.integers(2, 300), st.floats(0, 1, exclude_max=True))
def test_drawn_pivots_are_allowed(num_frames: int, uniform: float) -> None:
    assert (num_frames + 1) / 2 <= draw_pivot(num_frames, uniform=uniform) <= num_frames


def test_every_pivot_can_be_drawn() -> None:
    assert {draw_pivot(9, uniform=i / 100) for i in range(100)} == {5, 6, 7, 8, 9}


@pytest.mark.parametrize(("num_frames", "pivot"), [(9, 4), (9, 10), (8, 4)])
def test_other_pivots_are_refused(num_frames: int, pivot: int) -> None:
    with pytest.raises(ValueError, match=f"pivot={pivot}"):
        palindrome_indices(num_frames, pivot)


def test_actions_of_the_way_back_lead_back() -> None:
    c2w = smooth_path(33, seed=3)
    poses = integrate(window_actions(c2w, d_bar=0.1, pivot=20))
    for away in range(1, 14):
        assert torch.allclose(poses[19 + away], poses[19 - away], atol=1e-5)


def test_pure_motions_are_mirrored_on_the_way_back() -> None:
    actions = torch.zeros(9, 13, dtype=torch.float64)
    actions[1:, 9] = 3.0  # pan right
    turned = window_actions(integrate(actions), d_bar=1.0, pivot=5).double()
    expected = torch.cat([actions[:5], mirror_actions(actions[1:5])])
    expected[0, 12] = 1.0
    assert torch.allclose(turned, expected, atol=1e-6)


def test_windows_keep_the_d_bar_of_the_recording() -> None:
    c2w = smooth_path(65, seed=1)
    whole = encode_actions(c2w, d_bar=0.1).float()
    cropped = window_actions(c2w[16:33], d_bar=0.1)
    assert torch.allclose(cropped[1:], whole[17:33], atol=1e-6)
    assert cropped[0, 12] == 1
    strided = window_actions(c2w[::2], d_bar=0.1, stride=2)
    # two steps of half the unit: a steady walk keeps its label
    assert torch.allclose(
        strided[1:, :6].norm(dim=1), (whole[1::2, :6] + whole[2::2, :6]).norm(dim=1) / 2, rtol=0.05
    )


def test_rates_must_divide() -> None:
    assert stride_between(16, 16) == 1
    assert stride_between(60, 15) == 4
    for stored, asked in ((24, 16), (16, 24), (30, 16)):
        with pytest.raises(ValueError, match="whole number"):
            stride_between(stored, asked)
