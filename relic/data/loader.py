"""Batches in the order of a plan, with any number of workers; unreadable windows are replaced and counted."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from relic.data.collate import Sample, collate
from relic.data.reader import WindowReader
from relic.data.sampling import Plan
from relic.types import Batch, Mixed

__all__ = ["BatchLoader", "Failure", "MixedLoader", "Place", "WindowDataset"]

logger = logging.getLogger(__name__)

ATTEMPTS = 8  # windows tried for one sample
GRACE = 256  # samples before a rate means anything


class Place(NamedTuple):
    """The `place`-th sample of global batch `batch_index`."""

    batch_index: int
    place: int


class Failure(NamedTuple):
    """A sample that could not be read, and why."""

    key: str
    shard: str
    reason: str


class WindowDataset(Dataset[Any]):
    """Maps places to a batch, made where it is read, and the failures met on the way.

    Args:
        reader: Reads a window.
        plan: Says which window a place is.
    """

    def __init__(self, reader: WindowReader, plan: Plan) -> None:
        self.reader = reader
        self.plan = plan

    def __getitems__(self, places: list[Place]) -> tuple[Batch, list[Failure]]:
        failures: list[Failure] = []
        stacked = self._room(places) if self.reader.content == "video" else None
        rooms = [None] * len(places) if stacked is None else stacked.numpy()
        samples = [self._read(place, room, failures) for place, room in zip(places, rooms, strict=True)]
        return collate(samples, content=self.reader.content, stacked=stacked), failures

    def _room(self, places: list[Place]) -> Tensor:
        """Return memory for a batch of frames (b, f, h, w, 3); in a worker shared, so that none is copied."""
        num_frames = self.plan.draw(*places[0], attempt=0).num_frames
        shape = (len(places), num_frames, *self.reader.size, 3)
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)

    def _read(self, place: Place, room: np.ndarray | None, failures: list[Failure]) -> Sample:
        for attempt in range(ATTEMPTS):
            window = self.plan.draw(*place, attempt=attempt)
            try:
                return self.reader.read(window, out=room)
            except (ValueError, OSError) as error:
                failures.append(Failure(window.row.key, window.row.shard, str(error)))
        named = ", ".join(f"{failure.key} in {failure.shard}" for failure in failures[-ATTEMPTS:])
        raise RuntimeError(
            f"{ATTEMPTS} windows in a row could not be read ({named}); the last: {failures[-1].reason}. "
            "Look at the dataset with `relic inspect`."
        )


class BatchLoader:
    """Yields batches and counts what could not be read. Sized, so that the trainer prefetches nothing.

    Args:
        dataset: Maps places to a batch.
        places: Called at the start of each epoch: the places of its batches.
        length: Batches an epoch.
        workers: Processes that read; 0 reads in this one.
        max_corrupt: Share of unreadable samples above which iteration fails.
        keep_workers: Whether workers live on between epochs.
        warn: Where to say which sample was unreadable.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        places: Callable[[], Iterator[list[Place]]],
        *,
        length: int,
        workers: int,
        max_corrupt: float,
        keep_workers: bool,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        self._length = length
        self._max_corrupt = max_corrupt
        self._warn = warn
        self._named: set[tuple[str, str]] = set()
        self.drawn = self.corrupt = 0
        self._loader = DataLoader(
            dataset,
            batch_sampler=_Fresh(places),
            num_workers=workers,
            collate_fn=_identity,
            persistent_workers=keep_workers and workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each epoch advances the global generator
        )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        for batch, failures in self._loader:
            self.drawn += len(batch.key) + len(failures)
            self.corrupt += len(failures)
            for failure in failures:
                self._report(failure)
            yield batch

    def _report(self, failure: Failure) -> None:
        if (failure.key, failure.shard) not in self._named:
            self._named.add((failure.key, failure.shard))
            self._warn(f"skipped {failure.key} in {failure.shard}: {failure.reason}")
        if self.corrupt > self._max_corrupt * max(self.drawn, GRACE):
            names = ", ".join(f"{key} in {shard}" for key, shard in sorted(self._named))
            raise RuntimeError(
                f"{self.corrupt} of {self.drawn} samples could not be read, more than "
                f"max_corrupt={self._max_corrupt:g}: {names}. "
                "Repair the dataset (`relic inspect` lists what is wrong), or raise max_corrupt."
            )

    def close(self) -> None:
        """End the reading processes. Left alone, those kept between epochs may take seconds each to go."""
        running: Any = self._loader._iterator
        if running is not None:
            for worker in running._workers:
                worker.terminate()  # they hold nothing, and take it for a request of their parent
            running._shutdown_workers()
            self._loader._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module saves the batch index. To the trainer it says: resumable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing, see `state_dict`."""


class MixedLoader:
    """Yields a batch of each of two loaders as one `Mixed`."""

    def __init__(self, steered: BatchLoader, plain: BatchLoader) -> None:
        self.steered, self.plain = steered, plain

    def __len__(self) -> int:
        return len(self.steered)

    def close(self) -> None:
        """End the reading processes."""
        self.steered.close()
        self.plain.close()

    def __iter__(self) -> Iterator[Mixed]:
        for steered, plain in zip(self.steered, self.plain, strict=True):
            yield Mixed(steered, plain)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, see `BatchLoader.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing, see `BatchLoader.state_dict`."""


class _Fresh:
    """Asks for the places anew at the start of each epoch."""

    def __init__(self, places: Callable[[], Iterator[list[Place]]]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[list[Place]]:
        return self._places()


def _identity(collated: Any) -> Any:
    return collated
