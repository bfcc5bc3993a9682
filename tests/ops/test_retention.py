from dataclasses import replace

import pytest

from relic.ops.retention import (
    Compressed,
    Full,
    SinkWindow,
    Window,
    admit,
    block_range,
    block_that_ends,
    factors_seen,
    parse_policy,
    window_start,
)  # fmt: skip


def test_the_image_is_a_block_of_its_own():
    assert [list(block_range(b, block_latents=2)) for b in range(3)] == [[0], [1, 2], [3, 4]]
    assert [block_that_ends(n, block_latents=2) for n in (1, 3, 5)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Full(), [1] * 13),
        (Window(latents=4), [0] * 9 + [1] * 4),
        (Window(latents=8), [0] * 5 + [1] * 8),
        (SinkWindow(sink=1, window=4), [1] + [0] * 8 + [1] * 4),
        (Compressed(window=4), [1, 4, 2, 4, 4, 4, 2, 4, 4] + [1] * 4),
        (Compressed(window=8), [1, 4, 2, 4, 4] + [1] * 8),
    ],
)
def test_what_the_third_block_of_four_sees(policy, expected):
    assert list(factors_seen(policy, 3, block_latents=4)) == expected


def test_a_window_counts_the_current_block_and_grows_to_its_length():
    starts = [window_start(Window(latents=8), b, block_latents=4) for b in range(5)]
    assert starts == [0, 0, 1, 5, 9]


def test_a_latent_keeps_its_slot_until_one_of_its_factor_takes_it():
    policy = Compressed(window=4, schedule=(1, 2), max_latents=9)
    kept: tuple[int, ...] = ()
    for latent in range(5):
        kept = admit(policy, kept, latent)
    assert kept == (0, 1, 2, 3, 4)
    shown = {0: 1.0, 1: 0.4, 2: 0.2, 3: 0.6, 4: 0.3, 5: 0.5, 6: 0.1, 7: 0.9}

    def redundancy(latents: tuple[int, ...]) -> list[float]:
        return [shown[i] for i in latents]

    assert admit(policy, kept, 5, redundancy=redundancy) == (0, 1, 2, 5, 4)
    assert admit(policy, kept, 6, redundancy=redundancy) == (0, 1, 2, 3, 6)  # the image stays
    assert admit(policy, kept, 7, redundancy=redundancy) == kept  # what is shown already takes no slot
    assert admit(policy, kept, 7, redundancy=lambda i: [0.5] * len(i)) == kept  # of equals, the newest goes


def test_who_is_kept_must_be_said_once_it_depends_on_poses():
    policy = Compressed(window=4, schedule=(1, 2), max_latents=9)
    assert factors_seen(policy, 2, block_latents=4) == (1, 2, 1, 2, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="Block 3 comes after latents were given up"):
        factors_seen(policy, 3, block_latents=4)
    seen = factors_seen(policy, 3, block_latents=4, kept=(0, 1, 8, 7, 4))
    assert seen == (1, 2, 0, 0, 1, 0, 0, 2, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="All 5 slots are taken: give poses"):
        admit(policy, (0, 1, 2, 3, 4), 5)


def test_policies_are_said_in_a_word():
    short = Compressed(window=4, schedule=(1, 2))
    assert parse_policy("own", own=short) == short
    assert parse_policy("full", own=short) == Full()
    assert parse_policy("window:8", own=short) == Window(latents=8)
    assert parse_policy("sink_window:1:8", own=short) == SinkWindow(sink=1, window=8)
    assert parse_policy("compressed", own=short) == short
    assert parse_policy("compressed", own=Full()) == Compressed()
    assert parse_policy("compressed:8", own=short) == replace(short, window=8)
    longer = parse_policy("compressed:8:1,4,2", own=short)
    assert longer == replace(short, window=8, schedule=(1, 4, 2))
    assert parse_policy("compressed:4:2", own=Full()) == Compressed(window=4, schedule=(2,))
    for text in ("fool", "window", "window:x", "full:3", "sink_window:1", "compressed:8:1-2", "window:1,2"):
        with pytest.raises(ValueError, match=f"policy '{text}'.*known are own, full, window:LATENTS"):
            parse_policy(text, own=short)
