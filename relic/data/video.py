"""H.264 in memory: frames -> mp4 bytes, a window of an mp4 -> frames, decoding only what it needs."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

__all__ = ["KEY_FRAME_EVERY", "count_frames", "decode_video", "encode_video"]

Source = bytes | IO[bytes] | io.RawIOBase

KEY_FRAME_EVERY = 16  # frames: a window starts at most 15 frames after a key frame
# PyAV scales with a thread a core from version 17 on, which costs far more than it saves on small frames
ONE_THREAD: Any = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
QUALITY = 18  # crf; visually lossless


def encode_video(
    frames: Iterable[np.ndarray], *, fps: float, quality: int = QUALITY, preset: str = "ultrafast"
) -> tuple[bytes, tuple[int, int, int]]:
    """Encode frames, each (h, w, 3) uint8 RGB, as they come; the video is never held uncompressed.

    quality: x264's crf, less is better and larger. preset: x264's; "ultrafast" has no B-frames, so a reader
    finds frames in order.

    Returns:
        The mp4 bytes (the same for the same frames and library versions) and (num_frames, height, width).

    Raises:
        ValueError: If there is no frame, or one has another shape or type than the first, or odd sides.
    """
    buffer = io.BytesIO()
    shape: tuple[int, ...] | None = None
    count = 0
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        for frame in frames:
            if shape is None:
                shape = frame.shape
                _check_first(shape)
                stream.height, stream.width, stream.pix_fmt = shape[0], shape[1], "yuv420p"
                stream.codec_context.gop_size = KEY_FRAME_EVERY
                stream.codec_context.thread_count = 1  # more threads change the bytes
                stream.options = {"crf": str(quality), "preset": preset}
            if frame.shape != shape or frame.dtype != np.uint8:
                raise ValueError(
                    f"frame {count} is {frame.shape} {frame.dtype}; all frames must be {shape} uint8."
                )
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = count, 1 / stream.codec_context.framerate
            container.mux(stream.encode(picture))
            count += 1
        if shape is None:
            raise ValueError("a recording needs at least one frame; the iterable of frames was empty.")
        container.mux(stream.encode())
    return buffer.getvalue(), (count, shape[0], shape[1])


def _check_first(shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"frames must be (h, w, 3) RGB, got {shape}.")
    if shape[0] % 2 or shape[1] % 2:
        raise ValueError(f"frames are {shape[0]}x{shape[1]}; yuv420p needs even sides: crop or resize them.")


def count_frames(source: Source) -> int:
    """Return the number of frames an mp4 says it holds, from its header, without decoding.

    Raises:
        ValueError: If it is no readable mp4 with a video stream.
    """
    try:
        with av.open(_opened(source)) as container:
            return container.streams.video[0].frames
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"video is not readable: {error}") from error


def decode_video(
    source: Source,
    *,
    start: int = 0,
    stop: int | None = None,
    step: int = 1,
    size: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode frames start, start+step, ... below `stop` -> (f, h, w, 3) uint8 RGB.

    source: an mp4 as bytes, or as a seekable file, of which only the header and the needed part are read.
    size: (height, width) to scale frames to, by area averaging; None leaves them.
    out: (f, h, w, 3) uint8, contiguous, to decode into.

    Raises:
        ValueError: If the bytes are damaged or hold fewer frames than asked for.
    """
    try:
        with av.open(_opened(source)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # loaders run one process a core
            stream.codec_context.options = {"err_detect": "explode"}  # else damage is painted over
            stop = stream.frames if stop is None else stop
            height, width = size or (stream.height, stream.width)
            shape = (len(range(start, stop, step)), height, width, 3)
            video = np.empty(shape, np.uint8) if out is None else out
            assert video.shape == shape and video.flags.c_contiguous
            reformatter = VideoReformatter()
            found = 0
            for number, frame in _from(container, stream, start):
                if number >= stop:
                    break
                if frame.is_corrupt:
                    raise ValueError(f"video is damaged at frame {number}.")
                if number == start + found * step:
                    _paint(reformatter, frame, video[found])
                    found += 1
                    if found == len(video):
                        break
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"video is not readable: {error}") from error
    if found < len(video):
        raise ValueError(f"video holds {found} of the {len(video)} frames in [{start}, {stop}) step {step}.")
    return video


def _from(container, stream, start: int):  # type: ignore[no-untyped-def]  # PyAV's generics differ by version
    """Yield (frame number, frame) from `start` on, decoding from the key frame at or before it."""
    origin = stream.start_time or 0
    ticks = float(1 / (stream.time_base * stream.average_rate))  # of the time base, a frame
    if start:
        container.seek(origin + int(start * ticks), stream=stream, backward=True)
    for frame in container.decode(stream):
        number = round((frame.pts - origin) / ticks)
        if number >= start:
            yield number, frame


def _paint(reformatter: VideoReformatter, frame: av.VideoFrame, picture: np.ndarray) -> None:
    """Write a frame as RGB into `picture` (h, w, 3), scaled to it.

    All frames share a reformatter: `to_ndarray` sets up a scaler for each, which at 128x224 costs more than
    decoding.
    """
    height, width, _ = picture.shape
    same = (frame.height, frame.width) == (height, width)
    method = None if same else Interpolation.AREA
    rgb = reformatter.reformat(
        frame, width=width, height=height, format="rgb24", interpolation=method, **ONE_THREAD
    )
    rows = np.frombuffer(memoryview(rgb.planes[0]), np.uint8).reshape(height, rgb.planes[0].line_size)
    picture.reshape(height, 3 * width)[:] = rows[:, : 3 * width]  # rows are padded


def _opened(source: Source) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source
