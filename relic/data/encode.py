"""Encode a dataset of recordings into latent shards: windows are cut, and turned in time, before encoding.

A causal 1+4+4... VAE is neither reversible nor croppable inside a clip, so this is the last place where
windows and palindromes can be chosen. One output shard for each input shard and horizon, written whole or not
at all; a run that was stopped goes on with the first one missing and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from relic.data.augment import draw_pivot, window_actions
from relic.data.claim import alone, claim, remove_leftovers
from relic.data.index import INDEX_NAME, Index, Row, write_index
from relic.data.reader import WindowReader, caption_of
from relic.data.sampling import Window
from relic.data.schema import ACTIONS, JSON, LATENTS, LATENTS_SCHEMA, dump_array, dump_json
from relic.data.select import rows_of
from relic.data.shards import write_shard
from relic.data.storage import Storage
from relic.ops.randomness import derive_seed, keyed_generator
from relic.types import PATCH, SPACE_STRIDE, latents_of

__all__ = ["Encode", "EncodeSettings", "EncodeTask", "encode_dataset", "plan_encoding"]

SETTINGS_NAME: Final = "encode.json"
SETTINGS_SCHEMA: Final = "relic-encode/1"


class Encode(Protocol):
    """What encodes: video (b, f, 3, h, w) uint8 on the CPU -> normalised latents (b, t, c, h/8, w/8)."""

    def __call__(self, video: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Which windows are cut, and what encodes them. Decides every byte that is written.

    Args:
        horizons: Frames of the windows, each 4k+1; every horizon gets its own shards.
        stride_seconds: A window starts every so many seconds of a recording.
        palindromes: Share of windows that turn back in time.
        seed: Of which windows turn, and where.
        vae_sha256: Hash of the weights that encode.

    Raises:
        ValueError: If a setting is out of range.
    """

    horizons: tuple[int, ...] = (81,)
    stride_seconds: float = 1.0
    palindromes: float = 0.5
    seed: int = 0
    vae_sha256: str

    def __post_init__(self) -> None:
        if not self.horizons or len(set(self.horizons)) < len(self.horizons):
            raise ValueError(f"horizons={self.horizons} must name different window lengths, at least one.")
        for frames in self.horizons:
            latents_of(frames)
        if self.stride_seconds <= 0:
            raise ValueError(f"stride_seconds={self.stride_seconds} must be positive.")
        if not 0 <= self.palindromes <= 1:
            raise ValueError(f"palindromes={self.palindromes} must be in [0, 1].")


class EncodeTask(NamedTuple):
    """One output shard: the windows of one horizon in one input shard."""

    shard: str
    windows: tuple[Window, ...]


def plan_encoding(index: Index, settings: EncodeSettings) -> list[EncodeTask]:
    """Lay out the windows of every valid recording of every scene, by input shard and horizon.

    Raises:
        ValueError: If there is no usable recording, recordings differ in size or rate, their size cannot be
            encoded, or a horizon is longer than every one of them.
    """
    rows = rows_of(index, content="video")
    _check_alike(rows)
    longest = max(rows, key=lambda row: row.num_frames)
    tasks = []
    for horizon in settings.horizons:
        if horizon > longest.num_frames:
            raise ValueError(
                f"a horizon of {horizon} frames is longer than every recording in {index.root}; the longest, "
                f"{longest.key}, has {longest.num_frames}: give a shorter horizon or record longer."
            )
        for shard in sorted({row.shard for row in rows}):
            recordings = [row for row in rows if row.shard == shard]
            windows = tuple(w for row in recordings for w in _windows(row, horizon, settings=settings))
            if windows:
                name = f"shards/{PurePosixPath(shard).stem}-{horizon:03d}f.tar"
                tasks.append(EncodeTask(name, windows))
    return tasks


def encode_dataset(
    source: str | Path,
    out: str | Path,
    *,
    encode: Encode,
    settings: EncodeSettings,
    batch: int = 8,
    workers: int = 1,
    max_corrupt: float = 0.01,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path | None:
    """Encode the recordings at `source` into latent shards in the folder `out`, and index them.

    Args:
        source: Folder or fsspec URL of an indexed dataset of recordings.
        out: Folder; one that a stopped run with the same settings has begun is gone on with.
        encode: The VAE.
        settings: Which windows.
        batch: Windows encoded at a time; bounds memory.
        workers: Threads that decode video ahead of the VAE.
        max_corrupt: Share of the windows, of the part, that may be unreadable and left out.
        part: (i, n) encodes every n-th shard from the i-th on, so that n processes share the work.
        progress: Told after every window how many are done, of how many.

    Returns:
        The path of the index, or None if shards of other parts are still missing.

    Raises:
        FileNotFoundError: If the dataset or its index is missing.
        ValueError: If the dataset does not fit the settings, `out` was begun with others, the VAE fails, or
            more than `max_corrupt` of the windows are unreadable. Finished shards are kept.
    """
    if not 0 <= max_corrupt <= 1:
        raise ValueError(f"max_corrupt={max_corrupt} must be in [0, 1].")
    for name, value in {"batch": batch, "workers": workers}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    index = Index.open(source)
    every = plan_encoding(index, settings)
    storage, out = Storage(source), Path(out)
    with alone(out, part=part):
        tasks = every[part[0] :: part[1]]
        total, done = sum(len(task.windows) for task in tasks), 0
        skipped = _Skipped(total, max_corrupt)
        claim(
            out,
            _description(storage, settings),
            file=SETTINGS_NAME,
            meaning={"source": "another index of recordings", "vae_sha256": "another VAE"},
        )
        for task in tasks:
            path = out / task.shard
            if not path.exists():
                remove_leftovers(path)
                with ThreadPoolExecutor(workers) as pool:
                    cut = _read_ahead(
                        storage, task.windows, pool=pool, ahead=2 * max(batch, workers), skipped=skipped
                    )
                    samples = _encoded(cut, encode=encode, settings=settings, batch=batch)
                    told = _told(samples, progress, done=done, total=total)
                    first = next(told, None)
                    if first is None:  # of nothing readable no shard is made, so it is tried again
                        path.parent.mkdir(parents=True, exist_ok=True)
                        _unreadable(path).touch()  # for other parts not to wait for it
                    else:
                        write_shard(path, itertools.chain([first], told))
                        _unreadable(path).unlink(missing_ok=True)
            done += len(task.windows)
            progress(done, total)
        if skipped.count:
            warnings.warn(f"{skipped.count} of {total} windows were unreadable and left out.", stacklevel=2)
        paths = [out / task.shard for task in every]
        if not all(path.exists() or _unreadable(path).exists() for path in paths):
            return None
        return write_index(out, scenes=index.scenes)


def _unreadable(shard: Path) -> Path:
    """Return the mark of a shard of whose windows none could be read."""
    return shard.with_name(f".{shard.name}.unreadable")


class _Skipped:
    """Counts unreadable windows, and fails when they are too many."""

    def __init__(self, total: int, max_corrupt: float) -> None:
        self.count, self._total, self._most = 0, total, max_corrupt

    def add(self, window: Window, error: ValueError) -> None:
        self.count += 1
        where = f"frame {window.start} on of {window.row.key}"
        if self.count > self._most * self._total:
            raise ValueError(
                f"{self.count} of {self._total} windows are unreadable, more than max_corrupt="
                f"{self._most:g}; the last, {where}: {error} Repair the recordings and index them again, or "
                "raise max_corrupt."
            ) from error
        warnings.warn(f"left out {where}: {error}", stacklevel=2)


# -- windows -------------------------------------------------------------------------------------------------


def _windows(row: Row, horizon: int, *, settings: EncodeSettings) -> Iterator[Window]:
    stride = max(1, round(settings.stride_seconds * row.fps))
    for start in range(0, row.num_frames - horizon + 1, stride):
        generator = keyed_generator(settings.seed, "palindrome", row.key, start)
        turned, turn = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        pivot = draw_pivot(horizon, uniform=turn) if turned < settings.palindromes else None
        key = derive_seed(settings.seed, "encode", row.key, start, horizon)
        yield Window(row, start, horizon, 1, pivot, key)


def _check_alike(rows: Sequence[Row]) -> None:
    first = rows[0]
    grid = SPACE_STRIDE * PATCH
    if first.height % grid or first.width % grid:
        raise ValueError(
            f"{first.key} is {first.height}x{first.width}; sides must be multiples of {grid} (8x VAE, then "
            "2x2 patches): record or import at another size."
        )
    for row in rows:
        if (row.height, row.width, row.fps) != (first.height, first.width, first.fps):
            raise ValueError(
                f"{row.key} is {row.height}x{row.width} at {row.fps:g} fps, {first.key} is "
                f"{first.height}x{first.width} at {first.fps:g}: latents of different sizes or rates cannot "
                "be trained on together; encode them from datasets of their own."
            )


# -- samples -------------------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """A window with its frames (f, 3, h, w) uint8 and its actions (f, 13) float64."""

    window: Window
    video: Tensor
    actions: Tensor


def _read_ahead(
    storage: Storage,
    windows: Sequence[Window],
    *,
    pool: ThreadPoolExecutor,
    ahead: int,
    skipped: _Skipped,
) -> Iterator[_Cut]:
    """Yield windows in order, decoding up to `ahead` of them; unreadable ones are warned of and left out."""
    row, own = windows[0].row, threading.local()

    def read(window: Window) -> _Cut:
        if not hasattr(own, "reader"):  # open files belong to one thread
            own.reader = WindowReader(
                Storage(storage.root), size=(row.height, row.width), content="video", words=1
            )
        actions = window_actions(own.reader.poses(window), d_bar=window.row.d_bar, pivot=window.pivot)
        video = torch.from_numpy(own.reader.video(window))
        return _Cut(window, rearrange(video, "f h w c -> f c h w"), actions)

    def finished(window: Window, future: Future[_Cut]) -> Iterator[_Cut]:
        try:
            cut = future.result()
        except ValueError as error:
            skipped.add(window, error)
            return
        yield cut

    pending: deque[tuple[Window, Future[_Cut]]] = deque()
    try:
        for window in windows:
            pending.append((window, pool.submit(read, window)))
            if len(pending) > ahead:
                yield from finished(*pending.popleft())
        while pending:
            yield from finished(*pending.popleft())
    finally:
        for _, future in pending:
            future.cancel()


def _encoded(
    windows: Iterator[_Cut], *, encode: Encode, settings: EncodeSettings, batch: int
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Yield the samples of windows of one shape, in order."""
    while cut := list(itertools.islice(windows, batch)):
        latents = encode(torch.stack([each.video for each in cut])).detach().cpu()
        _check_latents(latents, cut[0].window)
        for each, latent in zip(cut, latents, strict=True):
            yield _sample(each.window, latent, each.actions, vae_sha256=settings.vae_sha256)


def _check_latents(latents: Tensor, window: Window) -> None:
    row = window.row
    expected = (latents_of(window.num_frames), row.height // SPACE_STRIDE, row.width // SPACE_STRIDE)
    if latents.ndim != 5 or (latents.shape[1], *latents.shape[3:]) != expected:
        raise ValueError(
            f"the VAE made latents {tuple(latents.shape)} of {window.num_frames} frames of "
            f"{row.height}x{row.width}; (b, t, c, h, w) with t, h, w = {expected} is needed: it must "
            "compress 4x8x8."
        )
    if not bool(latents.half().isfinite().all()):
        raise ValueError(f"the VAE made NaN or infinity of {row.key} from frame {window.start} on.")


def _sample(
    window: Window, latents: Tensor, actions: Tensor, *, vae_sha256: str
) -> tuple[str, dict[str, bytes]]:
    """Pack latents (t, c, h, w) and actions (f, 13) of a window."""
    row = window.row
    description = {
        "schema": LATENTS_SCHEMA,
        "num_frames": window.num_frames,
        "fps": row.fps,
        "height": row.height,
        "width": row.width,
        "d_bar": row.d_bar,
        "caption": caption_of(row, start=window.start),
        "scene": row.scene,
        "source": row.key,
        "start": window.start,
        "pivot": window.pivot,
        "vae_sha256": vae_sha256,
    }
    members = {
        LATENTS: dump_array(latents.half().numpy()),
        ACTIONS: dump_array(actions.numpy().astype(np.float32)),
        JSON: dump_json(description),
    }
    return f"{row.key}-{window.num_frames:03d}f-{window.start:06d}", members


def _told(
    samples: Iterator[Any], progress: Callable[[int, int], None], *, done: int, total: int
) -> Iterator[Any]:
    for number, sample in enumerate(samples, done):
        progress(number, total)
        yield sample


# -- the folder ----------------------------------------------------------------------------------------------


def _description(storage: Storage, settings: EncodeSettings) -> dict[str, Any]:
    return {
        "schema": SETTINGS_SCHEMA,
        "source": hashlib.sha256(storage.read(INDEX_NAME)).hexdigest(),
        "horizons": sorted(settings.horizons),
        "stride_seconds": settings.stride_seconds,
        "palindromes": settings.palindromes,
        "seed": settings.seed,
        "vae_sha256": settings.vae_sha256,
    }
