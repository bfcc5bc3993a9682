from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relic.data.video import count_frames, decode_video, encode_video
from tests.data.recordings import noise_frames

FRAMES = 50
MP4 = encode_video(noise_frames(FRAMES, seed=0), fps=16)[0]
WHOLE = decode_video(MP4)


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, FRAMES - 1), length=st.integers(1, FRAMES), step=st.integers(1, 5))
def test_a_window_equals_the_same_part_of_the_whole(start: int, length: int, step: int) -> None:
    stop = min(FRAMES, start + length)
    assert np.array_equal(decode_video(MP4, start=start, stop=stop, step=step), WHOLE[start:stop:step])


@pytest.mark.parametrize("fps", [8, 16, 24, 29.97, 30, 60])
def test_frames_are_found_at_any_rate(fps: float) -> None:
    mp4, shape = encode_video(noise_frames(40, seed=0), fps=fps)
    assert shape == (40, 64, 64)
    assert count_frames(mp4) == 40
    assert np.array_equal(decode_video(mp4, start=33, stop=40), decode_video(mp4)[33:40])
    assert np.abs(decode_video(mp4)[:, 8, 8, 0].astype(int) - np.arange(40)).max() < 12


def test_a_window_reads_a_part_of_the_file() -> None:
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.taken += len(data)
            return data

    mp4 = encode_video(np.random.default_rng(0).integers(0, 255, (200, 64, 64, 3), np.uint8), fps=16)[0]
    file = Counting(mp4)
    decode_video(file, start=100, stop=108)
    assert file.taken < len(mp4) / 3


def test_scaling_averages_areas() -> None:
    small = decode_video(MP4, start=3, stop=5, size=(32, 32))
    averaged = WHOLE[3:5].reshape(2, 32, 2, 32, 2, 3).mean((2, 4))
    assert small.shape == (2, 32, 32, 3)
    assert np.abs(small - averaged).mean() < 3


@pytest.mark.parametrize("damaged", [b"", b"no video", MP4[: len(MP4) // 2], MP4[:-200]])
def test_damage_is_a_value_error(damaged: bytes) -> None:
    with pytest.raises(ValueError, match=r"readable|holds"):
        decode_video(damaged)


def test_damage_inside_a_frame_is_a_value_error() -> None:
    damaged = bytearray(MP4)
    damaged[4000:4600] = bytes(600)
    with pytest.raises(ValueError, match=r"readable|damaged"):
        decode_video(bytes(damaged))


def test_frames_beyond_the_end_are_an_error() -> None:
    with pytest.raises(ValueError, match="holds 2 of the 5 frames"):
        decode_video(MP4, start=FRAMES - 2, stop=FRAMES + 3)


def test_frames_of_another_size_are_an_error() -> None:
    frames = [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)]
    with pytest.raises(ValueError, match="frame 1"):
        encode_video(frames, fps=16)
