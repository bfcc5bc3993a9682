"""Read one window of a dataset by byte ranges: its poses, its words and the frames or latents it needs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from relic.data.augment import palindrome_indices, window_actions
from relic.data.collate import Content, Sample
from relic.data.index import Row
from relic.data.sampling import Window
from relic.data.schema import ACTIONS, C2W, LATENTS, TEXT, TRAJECTORY, VIDEO, load_array
from relic.data.storage import Storage
from relic.data.video import decode_video
from relic.ops.camera import check_rigid
from relic.ops.words import word_ids
from relic.types import latents_of

__all__ = ["CAPTION_S", "WindowReader", "caption_of", "captions_from"]

CAPTION_S = 5.0  # seconds a caption speaks of


class WindowReader:
    """Reads windows of a dataset. May be sent to worker processes.

    Args:
        storage: Where the dataset lies.
        size: (height, width) that frames are scaled to.
        content: Which member of a sample is read.
        words: Length of the text in word ids.
    """

    def __init__(self, storage: Storage, *, size: tuple[int, int], content: Content, words: int) -> None:
        self.storage = storage
        self.size = size
        self.content = content
        self.words = words

    def read(self, window: Window, *, out: np.ndarray | None = None) -> Sample:
        """Read one window; frames into `out` (f, h, w, 3), if it is given.

        Raises:
            ValueError: If what is stored is damaged, not finite or not rigid.
            OSError: If the storage fails.
        """
        row = window.row
        if self.content == "video":
            content = torch.from_numpy(self.video(window, out=out))
            c2w = self.poses(window)
            actions = window_actions(c2w, d_bar=row.d_bar, stride=window.stride, pivot=window.pivot)
        else:
            content = self._latents(window)
            actions = torch.from_numpy(load_array(self._member(row, ACTIONS), key=f"{row.key}.{ACTIONS}"))
            actions = actions[: window.num_frames].float()
        return Sample(content, actions, self._text(window), row.d_bar * window.stride, window.key)

    def video(self, window: Window, *, out: np.ndarray | None = None) -> np.ndarray:
        """Decode a window -> (f, h, w, 3) uint8. Of a palindrome, only the way there is decoded."""
        offset, length = window.row.ranges[VIDEO]
        file = self.storage.open_range(window.row.shard, offset=offset, length=length)
        video = np.empty((window.num_frames, *self.size, 3), np.uint8) if out is None else out
        there = window.pivot or window.num_frames
        stop = window.start + (there - 1) * window.stride + 1
        decode_video(
            file, start=window.start, stop=stop, step=window.stride, size=self.size, out=video[:there]
        )
        if window.pivot is not None:
            back = palindrome_indices(window.num_frames, window.pivot)[there:]
            video[there:] = video[back.numpy()]
        return video

    def poses(self, window: Window) -> Tensor:
        """Read the poses of a window, before any palindrome -> (f, 4, 4) float64."""
        row = window.row
        c2w = torch.from_numpy(load_array(self._member(row, C2W), key=f"{row.key}.{C2W}")).double()
        stop = window.start + (window.num_frames - 1) * window.stride + 1
        c2w = c2w[window.start : stop : window.stride]
        if len(c2w) != window.num_frames:
            raise ValueError(f"{row.key}.{C2W} ends before frame {stop}.")
        check_rigid(c2w, name=f"{row.key}.{C2W}")
        return c2w

    def _text(self, window: Window) -> Tensor:
        """Return the prompt: embeddings (n, d) float32 if the sample holds them, else word ids (n,)."""
        if TEXT not in window.row.ranges:
            return word_ids(caption_of(window.row, start=window.start), length=self.words)
        array = load_array(self._member(window.row, TEXT), key=f"{window.row.key}.{TEXT}")
        if array.ndim != 2 or not np.isfinite(array).all():
            raise ValueError(
                f"{window.row.key}.{TEXT} has shape {array.shape}; it must be finite embeddings (n, d)."
            )
        return torch.from_numpy(array).float()

    def _latents(self, window: Window) -> Tensor:
        """Read a prefix of latents (t, c, h, w), or of a trajectory's states (s, t, c, h, w), float16."""
        name, axis = (LATENTS, 0) if self.content == "latents" else (TRAJECTORY, 1)
        array = load_array(self._member(window.row, name), key=f"{window.row.key}.{name}")
        array = array.take(range(latents_of(window.num_frames)), axis=axis)
        if not np.isfinite(array).all():
            raise ValueError(f"{window.row.key}.{name} holds NaN or infinity.")
        return torch.from_numpy(array)

    def _member(self, row: Row, name: str) -> bytes:
        offset, length = row.ranges[name]
        return self.storage.read(row.shard, offset=offset, length=length)


def captions_from(row: Row, *, start: int) -> tuple[str, ...]:
    """Return the captions from a window's first 5-s segment on; the last one speaks for what follows."""
    return row.captions[min(int(start / row.fps / CAPTION_S), len(row.captions) - 1) :]


def caption_of(row: Row, *, start: int) -> str:
    """Return the caption of a window: that of its first segment, empty if there is none."""
    return next(iter(captions_from(row, start=start)), "")
