from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relic.data.index import Row
from relic.data.sampling import FixedPlan, TrainPlan, Windows, rank_places, split_scenes
from relic.ops.actions import CHANNELS
from relic.ops.randomness import derive_seed


def walk(key: str, *, seconds: int = 10, channels: tuple[int, ...] = (0,), fps: float = 16.0) -> Row:
    """Return a recording that holds one key a second, `channels` in turn."""
    sums = np.zeros((seconds + 1, len(CHANNELS)), np.float32)
    for second in range(seconds):
        channel = channels[second % len(channels)]
        sums[second, channel] = fps * (2.0 if 6 <= channel < 12 else 1.0)
    return Row(
        key=key, scene=key, shard="a.tar", kind="clip", valid=True, reason="", fps=fps, height=64, width=64,
        num_frames=round(seconds * fps) + 1, d_bar=1.0, translates=True, captions=(), action_sums=sums,
        speed=0.0, turn_deg=0.0, revisit_share=0.0, revisit_gap_s=0.0, source="", start=0, pivot=None,
        vae_sha256="", levels=(), ranges={},
    )  # fmt: skip


def drawn_channels(windows: Windows, count: int = 2000) -> np.ndarray:
    numbers = [windows.pick((i + 0.5) / count) for i in range(count)]
    return np.bincount(windows.dominant[numbers], minlength=len(CHANNELS)) / count


def test_windows_start_at_whole_seconds_and_fit() -> None:
    windows = Windows.of([walk("a"), walk("b", seconds=3)], num_frames=49, fps=16, balance=0)
    assert windows.start_of[windows.row_of == 0].tolist() == [16 * second for second in range(8)]
    assert windows.start_of[windows.row_of == 1].tolist() == [0]


def test_a_stride_lengthens_windows() -> None:
    windows = Windows.of([walk("a", fps=32.0)], num_frames=49, fps=16, balance=0)
    assert windows.start_of.tolist() == [32 * second for second in range(8)]
    assert windows.window(2, pivot=None, key=0)[1:4] == (64, 49, 2)


def test_the_dominant_channel_is_measured_in_held_keys() -> None:
    row = walk("a", channels=(0,))
    row.action_sums[:, 9] = 24.0  # degrees a second: twelve frames of a held key, against sixteen
    assert set(Windows.of([row], num_frames=17, fps=16, balance=0).dominant) == {0}
    row.action_sums[:, 9] = 40.0
    assert set(Windows.of([row], num_frames=17, fps=16, balance=0).dominant) == {9}


def test_balance_evens_out_the_marginal_of_dominant_actions() -> None:
    rows = [
        walk("a", seconds=90, channels=(0,)),
        walk("b", seconds=9, channels=(9,)),
        walk("c", seconds=1, channels=(12,)),
    ]
    shares = {b: drawn_channels(Windows.of(rows, num_frames=17, fps=16, balance=b)) for b in (0.0, 0.5, 1.0)}
    assert shares[0.0][[0, 9, 12]] == pytest.approx([0.9, 0.09, 0.01], abs=0.002)
    roots = np.sqrt([0.9, 0.09, 0.01])
    assert shares[0.5][[0, 9, 12]] == pytest.approx(roots / roots.sum(), abs=0.002)
    assert shares[1.0][[0, 9, 12]] == pytest.approx([1 / 3] * 3, abs=0.002)


def test_draws_are_pure_functions_of_their_place() -> None:
    def plan() -> TrainPlan:
        windows = [Windows.of([walk("a"), walk("b")], num_frames=n, fps=16, balance=0.5) for n in (17, 33)]
        return TrainPlan(windows=windows, seed=3, palindromes=0.5)

    places = [(batch, place) for batch in range(20) for place in range(4)]
    forward = {at: plan().draw(*at, attempt=0) for at in places}
    again = plan()
    assert all(again.draw(*at, attempt=0) == forward[at] for at in reversed(places))
    assert forward[3, 2].key == derive_seed(3, "train", 3, 2)
    assert len({window.key for window in forward.values()}) == len(places)
    assert {len({forward[b, p].num_frames for p in range(4)}) for b in range(20)} == {1}, (
        "one horizon a batch"
    )
    assert {window.num_frames for window in forward.values()} == {17, 33}
    turned = sum(window.pivot is not None for window in forward.values()) / len(places)
    assert 0.3 < turned < 0.7


def test_another_attempt_draws_anew_under_the_same_key() -> None:
    windows = Windows.of([walk("a", seconds=1000)], num_frames=17, fps=16, balance=0)
    plan = TrainPlan(windows=[windows], seed=0, palindromes=0)
    draws = [plan.draw(0, 0, attempt=attempt) for attempt in range(4)]
    assert len({draw.start for draw in draws}) == 4
    assert len({draw.key for draw in draws}) == 1


def test_fixed_windows_are_distinct_while_there_are_any() -> None:
    windows = Windows.of([walk("a"), walk("b")], num_frames=17, fps=16, balance=1.0)
    plan = FixedPlan.of(windows, seed=0, stage="validation", batch=4)
    draws = [plan.draw(i // 4, i % 4, attempt=0) for i in range(2 * len(windows))]
    shown = [(draw.row.key, draw.start) for draw in draws]
    assert len(set(shown[: len(windows)])) == len(windows)
    assert shown[len(windows) :] == shown[: len(windows)]
    assert len({draw.key for draw in draws}) == len(draws)
    assert plan.draw(0, 0, attempt=1)[:2] == draws[1][:2]


names = st.lists(st.text("abcd", min_size=1, max_size=4), min_size=1, max_size=12, unique=True)
orders = names.flatmap(lambda scenes: st.tuples(st.just(scenes), st.permutations(scenes)))


@given(orders, st.integers(0, 3), st.integers(0, 3))
def test_scenes_are_held_out_whatever_their_order(
    orders: tuple[list[str], list[str]], validation: int, evaluation: int
) -> None:
    scenes, shuffled = orders
    splits = split_scenes(scenes, validation_scenes=validation, evaluation_scenes=evaluation)
    assert splits == split_scenes(shuffled, validation_scenes=validation, evaluation_scenes=evaluation)
    assert list(splits.values()).count("evaluation") == min(evaluation, len(scenes))
    assert list(splits.values()).count("validation") == min(validation, max(0, len(scenes) - evaluation))


def test_new_scenes_never_move_an_evaluation_scene_into_training() -> None:
    scenes = [f"scene{i}" for i in range(30)]
    before = split_scenes(scenes[:20], validation_scenes=3, evaluation_scenes=3)
    after = split_scenes(scenes, validation_scenes=3, evaluation_scenes=3)
    order = ["evaluation", "validation", "train"]
    assert all(order.index(before[scene]) <= order.index(after[scene]) for scene in before)


def test_ranks_share_a_batch_by_turns() -> None:
    assert [list(rank_places(6, rank=rank, world_size=2)) for rank in (0, 1)] == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(ValueError, match="batch of 6 cannot be shared by 4 ranks"):
        rank_places(6, rank=0, world_size=4)
