from __future__ import annotations

import pytest

from relic.ops.words import WORD_ROWS, word_ids


def test_words_are_hashed_whatever_their_case_and_punctuation() -> None:
    ids = word_ids("A red door, a RED wall.", length=8)
    assert ids.shape == (8,)
    assert ids[0] == ids[3] and ids[1] == ids[4]
    assert ids[2] not in (0, ids[1], ids[5])
    assert ids[6:].tolist() == [0, 0]


def test_ids_are_fixed_for_ever() -> None:
    # checkpoints depend on these numbers
    assert word_ids("a room with stairs", length=5).tolist() == [
        5433,
        *word_ids("room with stairs", length=4).tolist(),
    ]


def test_ids_stay_in_the_table_and_never_are_padding() -> None:
    ids = word_ids(" ".join(f"word{i}" for i in range(5000)), length=5000)
    assert ids.min() >= 1 and ids.max() < WORD_ROWS and ids.max() > 0.99 * WORD_ROWS


def test_long_captions_are_cut_and_empty_ones_are_padding() -> None:
    assert word_ids("one two three", length=2).tolist() == word_ids("one two", length=2).tolist()
    assert word_ids("", length=3).tolist() == [0, 0, 0]


def test_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        word_ids("a room", length=0)
