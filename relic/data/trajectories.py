"""Write ODE solutions of a teacher as shards, from the windows of a dataset of latents (paper §4.4).

A solution starts from noise, the first latents (the image's, or more), the actions and the caption of a
window; it takes the place of the window's latents, and keeps where they came from. Shards hold a few windows
each and are written whole or not at all: a run that was stopped goes on with the first one missing and ends
with the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from relic.data.claim import alone, claim, remove_leftovers
from relic.data.collate import Sample
from relic.data.index import INDEX_NAME, Index, Row, write_index
from relic.data.reader import WindowReader, caption_of
from relic.data.sampling import Window
from relic.data.schema import ACTIONS, JSON, LATENTS_SCHEMA, TRAJECTORY, dump_array, dump_json
from relic.data.select import check_shape, rows_of
from relic.data.shards import write_shard
from relic.data.storage import Storage
from relic.ops.randomness import derive_seed, keyed_normal
from relic.types import ClipSpec, latents_of

__all__ = ["PairsSettings", "PairsTask", "Solve", "plan_pairs", "write_pairs"]

SETTINGS_NAME: Final = "ode_pairs.json"
SETTINGS_SCHEMA: Final = "relic-ode-pairs/1"


class Solve(Protocol):
    """What solves: noise (b, t, c, h, w), the first latents, clean, (b, n, c, h, w), actions (b, f, 13) and
    word ids (b, n), all on the CPU -> states (b, s, t, c, h, w), one a level and the clean end.
    """

    def __call__(self, noise: Tensor, /, *, given: Tensor, actions: Tensor, text: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class PairsSettings:
    """Which windows are solved, from which noise, and by what. Decides every byte that is written.

    Args:
        horizons: Frames of the solutions, each 4k+1; every horizon gets its own shards.
        windows: Solutions of each horizon, spread evenly over scenes; None takes every window.
        prefix_share: Share of the shards whose solutions go on from more than the image: from the image and
            whole blocks of the window, any number but all.
        per_shard: Solutions in a shard: what a stopped run may have to do again.
        seed: Of the noise, and of which windows are taken.
        levels: Noise levels of the states that are kept, from 1 down; the clean end comes after them.
        sampler: How the teacher solves, plain values by name.
        teacher_sha256: Hash of the teacher's weights.

    Raises:
        ValueError: If a setting is out of range.
    """

    horizons: tuple[int, ...] = (81,)
    windows: int | None = None
    prefix_share: float = 0.0
    per_shard: int = 16
    seed: int = 0
    levels: tuple[float, ...]
    sampler: Mapping[str, float]
    teacher_sha256: str

    def __post_init__(self) -> None:
        if not self.horizons or len(set(self.horizons)) < len(self.horizons):
            raise ValueError(f"horizons={self.horizons} must name different lengths in frames, at least one.")
        for frames in self.horizons:
            latents_of(frames)
        for name, value in {"windows": self.windows, "per_shard": self.per_shard}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0.0 <= self.prefix_share <= 1.0:
            raise ValueError(f"prefix_share={self.prefix_share} must be in [0, 1], a share of the shards.")
        if not self.levels or self.levels[0] != 1.0 or min(self.levels) <= 0.0:
            raise ValueError(f"levels={self.levels} must go from 1 down and end above 0.")


class PairsTask(NamedTuple):
    """One output shard: what is solved, and from how many latents of each window."""

    shard: str
    windows: tuple[Window, ...]
    known: int


def plan_pairs(index: Index, settings: PairsSettings, *, clip: ClipSpec) -> list[PairsTask]:
    """Lay out what is solved, by horizon.

    A horizon is solved from windows of its length, or, if there are none, from the beginning of the next
    longer ones. No scene is left out, so that those held out for validation have solutions too.

    Args:
        index: Of a dataset of latents.
        settings: Which windows.
        clip: Size and rate that the teacher was fitted to, and its longest horizon.

    Raises:
        ValueError: If latents don't fit `clip`, a horizon is longer than the teacher's or than every window,
            or there are fewer `windows` than scenes.
    """
    rows = rows_of(index, content="latents")
    check_shape(rows, clip=clip, content="latents")
    tasks = []
    for horizon in sorted(settings.horizons):
        if horizon > clip.max_frames:
            raise ValueError(
                f"a horizon of {horizon} frames is longer than the {clip.max_frames} that the teacher was "
                "fitted to; give the teacher of that horizon, or a shorter one."
            )
        chosen = _spread(_long_enough(rows, horizon), settings)
        windows = [
            Window(row, 0, horizon, 1, None, derive_seed(settings.seed, "ode-pairs", row.key, horizon))
            for row in chosen
        ]
        for number, start in enumerate(range(0, len(windows), settings.per_shard)):
            name = f"shards/{horizon:03d}f-{number:05d}.tar"
            known = _known(settings, name, latents=latents_of(horizon), block_latents=clip.block_latents)
            tasks.append(PairsTask(name, tuple(windows[start : start + settings.per_shard]), known))
    return tasks


def _known(settings: PairsSettings, shard: str, *, latents: int, block_latents: int) -> int:
    """Draw from how many latents the solutions of a shard go on: the image and whole blocks."""
    rng = np.random.default_rng(derive_seed(settings.seed, "ode-pairs prefix", shard))
    blocks = (latents - 1) // block_latents
    longer = rng.random() < settings.prefix_share and blocks > 1
    return 1 + block_latents * int(rng.integers(1, blocks)) if longer else 1


def _long_enough(rows: Sequence[Row], horizon: int) -> list[Row]:
    lengths = {row.num_frames for row in rows}
    fitting = [length for length in lengths if length >= horizon]
    if not fitting:
        raise ValueError(
            f"a horizon of {horizon} frames is longer than every window; the longest have {max(lengths)}: "
            "give a shorter horizon, or encode longer windows."
        )
    return [row for row in rows if row.num_frames == min(fitting)]


def _spread(rows: Sequence[Row], settings: PairsSettings) -> list[Row]:
    """Return the windows that are taken, by key: those of each scene in turn, in drawn order."""
    if settings.windows is None:
        return sorted(rows, key=lambda row: row.key)
    scenes: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: derive_seed(settings.seed, "ode-pairs window", row.key)):
        scenes[row.scene].append(row)
    if settings.windows < len(scenes):
        raise ValueError(
            f"windows={settings.windows} would leave out some of the {len(scenes)} scenes, perhaps those "
            f"held out for validation; take at least {len(scenes)}."
        )
    turns = itertools.zip_longest(*(scenes[scene] for scene in sorted(scenes)))
    in_turn = [row for turn in turns for row in turn if row is not None]
    return sorted(in_turn[: settings.windows], key=lambda row: row.key)


def write_pairs(
    source: str | Path,
    out: str | Path,
    *,
    solve: Solve,
    settings: PairsSettings,
    clip: ClipSpec,
    words: int,
    batch: int = 1,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path | None:
    """Solve the windows at `source` and write the states as shards in the folder `out`, with an index.

    Args:
        source: Folder or fsspec URL of an indexed dataset of latents.
        out: Folder; one that a stopped run with the same settings has begun is gone on with.
        solve: The teacher.
        settings: Which windows, and provenance.
        clip: What the teacher was fitted to.
        words: Length of a prompt in word ids.
        batch: Windows solved at a time; bounds memory.
        part: (i, n) solves every n-th shard from the i-th on, so that n processes share the work.
        progress: Told after every window how many are done, of how many.

    Returns:
        The path of the index, or None if shards of other parts are still missing.

    Raises:
        FileNotFoundError: If the dataset or its index is missing.
        ValueError: If the dataset does not fit the settings, `out` was begun with others, or the teacher
            fails.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1.")
    index = Index.open(source)
    every = plan_pairs(index, settings, clip=clip)
    storage, out = Storage(source), Path(out)
    with alone(out, part=part):
        claim(
            out,
            _description(storage, settings),
            file=SETTINGS_NAME,
            meaning={"source": "another index of latents", "teacher_sha256": "another teacher"},
        )
        reader = WindowReader(storage, size=(clip.height, clip.width), content="latents", words=words)
        tasks = every[part[0] :: part[1]]
        total, done = sum(len(task.windows) for task in tasks), 0
        for task in tasks:
            path = out / task.shard
            if not path.exists():
                remove_leftovers(path)
                starts = _read(reader, task.windows)
                samples = _solved(starts, solve=solve, known=task.known, settings=settings, batch=batch)
                write_shard(path, _told(samples, progress, done=done, total=total))
            done += len(task.windows)
            progress(done, total)
        if not all((out / task.shard).exists() for task in every):
            return None
        return write_index(out, scenes=index.scenes)


class _Start(NamedTuple):
    """A window, and what its solution starts from."""

    window: Window
    sample: Sample


def _read(reader: WindowReader, windows: Sequence[Window]) -> Iterator[_Start]:
    """Yield windows in order; unreadable ones are warned of and left out."""
    for window in windows:
        try:
            yield _Start(window, reader.read(window))
        except ValueError as error:
            warnings.warn(f"left out {window.row.key}: {error}", stacklevel=2)


def _solved(
    starts: Iterator[_Start], *, solve: Solve, known: int, settings: PairsSettings, batch: int
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Yield the samples of windows of one length, in order."""
    while begun := list(itertools.islice(starts, batch)):
        samples = [start.sample for start in begun]
        latents = torch.stack([sample.content for sample in samples]).float()
        noise = keyed_normal([sample.key for sample in samples], "noise", like=latents)  # on the CPU: the
        # start of a solution does not depend on the device
        states = solve(
            noise,
            given=latents[:, :known],
            actions=torch.stack([sample.actions for sample in samples]),
            text=torch.stack([sample.text for sample in samples]),
        )
        states = states.detach().cpu()
        expected = (len(begun), len(settings.levels) + 1, *latents.shape[1:])
        if states.shape != expected:
            raise ValueError(f"the teacher made states {tuple(states.shape)}; {expected} are needed.")
        for start, solution in zip(begun, states, strict=True):
            yield _sample(start, solution, settings=settings)


def _sample(start: _Start, states: Tensor, *, settings: PairsSettings) -> tuple[str, dict[str, bytes]]:
    """Pack states (s, t, c, h, w) and actions of a window."""
    window, row = start.window, start.window.row
    half = states.half()
    if not bool(half.isfinite().all()):
        raise ValueError(f"the teacher made NaN or infinity of {row.key}.")
    turned = row.pivot is not None and row.pivot < window.num_frames
    description = {
        "schema": LATENTS_SCHEMA,
        "num_frames": window.num_frames,
        "fps": row.fps,
        "height": row.height,
        "width": row.width,
        "d_bar": row.d_bar,
        "caption": caption_of(row, start=window.start),
        "scene": row.scene,
        "source": row.source,
        "start": row.start,
        "pivot": row.pivot if turned else None,
        "vae_sha256": row.vae_sha256,
        "window": row.key,
        **_provenance(settings),
    }
    members = {
        TRAJECTORY: dump_array(half.numpy()),
        ACTIONS: dump_array(start.sample.actions.numpy().astype(np.float32)),
        JSON: dump_json(description),
    }
    return f"{row.key}-ode-{window.num_frames:03d}f", members


def _told(
    samples: Iterator[Any], progress: Callable[[int, int], None], *, done: int, total: int
) -> Iterator[Any]:
    for number, sample in enumerate(samples, done):
        progress(number, total)
        yield sample


def _provenance(settings: PairsSettings) -> dict[str, Any]:
    return {
        "levels": list(settings.levels),
        "sampler": dict(settings.sampler),
        "teacher_sha256": settings.teacher_sha256,
    }


def _description(storage: Storage, settings: PairsSettings) -> dict[str, Any]:
    return {
        "schema": SETTINGS_SCHEMA,
        "source": hashlib.sha256(storage.read(INDEX_NAME)).hexdigest(),
        "horizons": sorted(settings.horizons),
        "windows": settings.windows,
        "prefix_share": settings.prefix_share,
        "per_shard": settings.per_shard,
        "seed": settings.seed,
        **_provenance(settings),
    }
