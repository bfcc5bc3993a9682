"""Fixed windows of a dataset as `Clip`s, for callbacks and reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from relic.data.index import Index
from relic.data.reader import WindowReader, captions_from
from relic.data.sampling import FixedPlan, Split, Window
from relic.data.schema import CLIP_SCHEMA, JSON, load_json
from relic.data.select import check_shape, lay_out, rows_of, split_rows
from relic.data.storage import Storage
from relic.types import Clip, ClipSpec

__all__ = ["read_clips"]


def read_clips(
    root: str | Path,
    *,
    split: Split,
    num_clips: int,
    num_frames: int,
    seed: int,
    validation_scenes: int = 2,
    evaluation_scenes: int = 2,
    clip: ClipSpec | None = None,
    balance: float = 0.0,
) -> list[Clip]:
    """Read `num_clips` windows of `num_frames` of a split's recordings, the same for equal arguments.

    Args:
        root: Folder or fsspec URL of a dataset of recordings.
        split: Which scenes; held out exactly as `WorldDataModule` does with the same numbers.
        num_clips: Windows. They come from as many recordings as there are before one gives a second.
        num_frames: Frames of a window at the rate read.
        seed: Chooses among windows.
        validation_scenes: Scenes held out for validation.
        evaluation_scenes: Scenes held out for the final test.
        clip: Size and rate to read at; None leaves both as stored.
        balance: How much rare actions are favoured, see `WorldDataModule`.

    Raises:
        FileNotFoundError: If the dataset, its index or shards are missing.
        ValueError: If there are not so many windows, or a recording is damaged.
    """
    index = Index.open(root)
    rows = split_rows(
        rows_of(index, content="video"),
        scenes=index.scenes,
        split=split,
        validation_scenes=validation_scenes,
        evaluation_scenes=evaluation_scenes,
    )
    if clip is not None:
        check_shape(rows, clip=clip, content="video")
    fps = rows[0].fps if clip is None else clip.fps
    windows = lay_out(rows, num_frames=num_frames, fps=fps, balance=balance)
    if len(windows) < num_clips:
        raise ValueError(
            f"{root}: the {split} scenes hold {len(windows)} windows of {num_frames} frames, "
            f"{num_clips} were asked for."
        )
    plan = FixedPlan.of(windows, seed=seed, stage=split, batch=len(windows))
    storage = Storage(root)
    chosen = _spread(plan, num_windows=len(windows), num_clips=num_clips)
    return [_read(storage, window, clip=clip) for window in chosen]


def _spread(plan: FixedPlan, *, num_windows: int, num_clips: int) -> Iterator[Window]:
    """Take windows in the plan's order, the first of every recording before any second."""
    drawn = [plan.draw(0, place, attempt=0) for place in range(num_windows)]
    turns: Counter[str] = Counter()
    ranked = []
    for order, window in enumerate(drawn):
        ranked.append((turns[window.row.key], order, window))
        turns[window.row.key] += 1
    ranked.sort(key=lambda entry: entry[:2])
    return (window for _, _, window in ranked[:num_clips])


def _read(storage: Storage, window: Window, *, clip: ClipSpec | None) -> Clip:
    row = window.row
    height, width = (row.height, row.width) if clip is None else (clip.height, clip.width)
    reader = WindowReader(storage, size=(height, width), content="video", words=1)
    offset, length = row.ranges[JSON]
    data = storage.read(row.shard, offset=offset, length=length)
    description = load_json(data, schema=CLIP_SCHEMA, key=row.key)
    intrinsics_px = torch.tensor(description["intrinsics_px"], dtype=torch.float64)
    return Clip(
        video=torch.from_numpy(reader.video(window)),
        c2w=reader.poses(window),
        intrinsics_px=scale_intrinsics(intrinsics_px, factor=height / row.height),
        fps=row.fps / window.stride,
        d_bar=row.d_bar * window.stride,
        captions=captions_from(row, start=window.start),
        provenance=description["provenance"]
        | {"key": row.key, "start": window.start, "stride": window.stride},
    )


def scale_intrinsics(intrinsics_px: Tensor, *, factor: float) -> Tensor:
    """Scale `fx fy cx cy` (4,) with the picture; pixel centres are integers, so edges lie at -0.5."""
    fx, fy, cx, cy = intrinsics_px
    return torch.stack([fx * factor, fy * factor, (cx + 0.5) * factor - 0.5, (cy + 0.5) * factor - 0.5])
