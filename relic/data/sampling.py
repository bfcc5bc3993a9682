"""Which window is the j-th sample of the i-th batch: pure functions of (seed, batch index, sample index)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
import torch

from relic.data.augment import draw_pivot, stride_between
from relic.data.index import Row
from relic.ops.actions import CHANNELS, KEY_TURN_DEG, STATIC
from relic.ops.randomness import derive_seed, keyed_generator

__all__ = ["FixedPlan", "Plan", "Split", "TrainPlan", "Window", "Windows", "rank_places", "split_scenes"]

Split = Literal["train", "validation", "evaluation"]

# a held key of each channel for one frame: what makes sums of d̄ and degrees comparable
UNITS: Final = np.array(
    [KEY_TURN_DEG if index >= 6 and index != STATIC else 1.0 for index in range(len(CHANNELS))]
)


class Window(NamedTuple):
    """What one sample shows: frames start, start+stride, ... of `row`, and the key of all its noise."""

    row: Row
    start: int
    num_frames: int
    stride: int
    pivot: int | None
    key: int


class Plan(Protocol):
    """Says which window a sample is; `attempt` counts from 0 and goes up when a window proved unreadable."""

    def draw(self, batch_index: int, place: int, *, attempt: int) -> Window: ...


def split_scenes(
    scenes: Iterable[str], *, validation_scenes: int, evaluation_scenes: int
) -> dict[str, Split]:
    """Assign every scene to a split, by rank of a hash of its name: neither order nor seed matters."""
    ranked = sorted(set(scenes), key=lambda scene: derive_seed("held-out scene", scene))
    splits: dict[str, Split] = {}
    for rank, scene in enumerate(ranked):
        held = rank < evaluation_scenes + validation_scenes
        splits[scene] = "evaluation" if rank < evaluation_scenes else "validation" if held else "train"
    return splits


def rank_places(global_batch: int, *, rank: int, world_size: int) -> range:
    """Return which samples of a global batch a rank reads: j goes to rank j % world_size.

    Raises:
        ValueError: If ranks would get unequal shares.
    """
    if global_batch % world_size:
        raise ValueError(
            f"a batch of {global_batch} cannot be shared by {world_size} ranks; global_batch and "
            f"validation_windows must be multiples of {world_size}, and so must the parts of a mixture."
        )
    return range(rank, global_batch, world_size)


@dataclass(frozen=True)
class Windows:
    """All windows of one length, starting at whole seconds, with the chance of drawing each.

    Args:
        rows: The samples windows are taken from.
        row_of: (n,) place in `rows` of each window.
        start_of: (n,) first frame of each window.
        dominant: (n,) the channel that moves most, each measured in held keys.
        cumulative: (n,) running sum of the chances, ending at 1.
        num_frames: Frames of a window.
        fps: Frames a second of a window.
    """

    rows: Sequence[Row]
    row_of: np.ndarray
    start_of: np.ndarray
    dominant: np.ndarray
    cumulative: np.ndarray
    num_frames: int
    fps: float

    @classmethod
    def of(cls, rows: Sequence[Row], *, num_frames: int, fps: float, balance: float) -> Windows:
        """Lay out the windows of `rows`, weighed by inverse frequency of the dominant channel, ^ `balance`.

        An encoded sample is one window, of which a prefix may be taken. `balance` 0 leaves windows equally
        likely, 1 makes the dominant channels so.
        """
        row_of, start_of, sums = [], [], []
        for place, row in enumerate(rows):
            stride = stride_between(row.fps, fps)
            second = max(1, round(row.fps))
            span = (num_frames - 1) * stride + 1
            last = row.num_frames - span if row.kind == "clip" else min(0, row.num_frames - span)
            seconds = max(1, span // second)
            for start in range(0, last + 1, second):
                row_of.append(place)
                start_of.append(start)
                sums.append(row.action_sums[start // second : start // second + seconds].sum(0) / UNITS)
        dominant = np.array([int(total.argmax()) for total in sums], dtype=np.int64)
        count = np.bincount(dominant, minlength=len(CHANNELS))
        weights = (len(dominant) / np.maximum(count, 1)[dominant]) ** balance
        cumulative = np.cumsum(weights) / weights.sum() if len(weights) else weights
        return cls(rows, np.array(row_of), np.array(start_of), dominant, cumulative, num_frames, fps)

    def __len__(self) -> int:
        return len(self.row_of)

    def pick(self, uniform: float) -> int:
        """Turn a uniform number in [0, 1) into a window number, by its chance."""
        return min(int(np.searchsorted(self.cumulative, uniform, side="right")), len(self) - 1)

    def window(self, number: int, *, pivot: int | None, key: int) -> Window:
        row = self.rows[self.row_of[number]]
        stride = stride_between(row.fps, self.fps)
        return Window(row, int(self.start_of[number]), self.num_frames, stride, pivot, key)


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Endless training samples. The horizon belongs to the batch, everything else to the sample.

    Args:
        windows: One table a horizon.
        seed: Of the run.
        palindromes: Share of samples turned back in time.
    """

    windows: Sequence[Windows]
    seed: int
    palindromes: float

    def draw(self, batch_index: int, place: int, *, attempt: int) -> Window:
        key = derive_seed(self.seed, "train", batch_index, place)
        generator = keyed_generator(key, "window", attempt)
        window, turned, turn = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        windows = self.windows[derive_seed(self.seed, "horizon", batch_index) % len(self.windows)]
        pivot = draw_pivot(windows.num_frames, uniform=turn) if turned < self.palindromes else None
        return windows.window(windows.pick(window), pivot=pivot, key=key)


@dataclass(frozen=True, kw_only=True)
class FixedPlan:
    """The same samples every time: distinct windows while there are any, then the same ones with other noise.

    Args:
        windows: One table.
        order: Window numbers, see `of`.
        seed: Of the run.
        stage: Part of every key, e.g. "validation".
        batch: Samples in a global batch.
    """

    windows: Windows
    order: Sequence[int]
    seed: int
    stage: str
    batch: int

    @classmethod
    def of(cls, windows: Windows, *, seed: int, stage: str, batch: int) -> FixedPlan:
        """Order windows by a weighted draw without repeats: smallest -log(u)/weight first (Efraimidis)."""
        chances = np.diff(windows.cumulative, prepend=0.0)
        generator = keyed_generator(seed, stage, "windows")
        uniform = torch.rand(len(chances), generator=generator, dtype=torch.float64).numpy()
        order = np.argsort(-np.log1p(-uniform) / chances, kind="stable").tolist()
        return cls(windows=windows, order=order, seed=seed, stage=stage, batch=batch)

    def draw(self, batch_index: int, place: int, *, attempt: int) -> Window:
        sample = batch_index * self.batch + place
        number = self.order[(sample + attempt) % len(self.order)]
        return self.windows.window(number, pivot=None, key=derive_seed(self.seed, self.stage, sample))
