"""What a suite is made of: cases, each a clip to be generated again from its beginning and its actions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from relic.suite.judges import Judges
from relic.suite.scripts import Measures
from relic.types import Clip

__all__ = ["Case", "NoTruth"]


class Case(Protocol):
    """A clip and which part of it is given. Engine scripts, MIND and MemoBench clips are all such.

    Attributes:
        name: Unique in a run; a file name.
        group: What tables are made by.
        measures: "action" or "memory".
        words: What happens, for people.
        num_frames: Of the whole clip.
        outward: Frames after the image that are shown as truth, rounded up to whole blocks.
    """

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def measures(self) -> Measures: ...
    @property
    def words(self) -> str: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def outward(self) -> int: ...

    def truth(self) -> Clip:
        """Return the true clip, whose `d_bar` its actions are in.

        Raises:
            NoTruth: If there is none, with the reason.
        """
        ...

    def extras(self, video: Tensor, truth: Clip, *, judges: Judges, folder: Path) -> Mapping[str, Any]:
        """Return what a benchmark measures or writes besides: `scores` by name, and anything of its own.

        video: uint8 (f, h, w, 3). folder: where its own files go, one a contestant.
        """
        ...


class NoTruth(ValueError):
    """A case has no truth here; it is reported as skipped, with this text."""
