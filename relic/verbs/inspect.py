"""`relic inspect`: what is in a dataset, printed and drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relic.data.describe import AWAY_S
from relic.data.index import Index, Row
from relic.data.sampling import UNITS
from relic.data.schema import ACTIONS, C2W, VIDEO, load_array
from relic.data.storage import Storage
from relic.data.video import decode_video
from relic.ops.actions import CHANNELS, integrate

__all__ = ["action_shares", "describe", "draw_card", "inspect"]

INK, MUTED, GRID = "#22303c", "#6b7c8c", "#e3e8ec"
MOVE, TURN, REST = "#2a7f9e", "#d98032", "#8a97a3"  # translation, rotation, standing still
PATHS = 40  # drawn at most: more become a blot
SHEET = (2, 6)  # rows and columns of frames


def inspect(root: str, *, out: str | None = None) -> None:
    """Print a dataset's card and draw it.

    Args:
        root: Folder or fsspec URL of a dataset with an index.
        out: Where the picture goes; by default card.png in the dataset's folder, or here if it is remote.
    """
    index = Index.read(root)
    print("\n".join(describe(index)))
    rows = [row for row in index.rows if row.valid]
    if not rows:
        print("picture    none: no sample is valid")
        return
    storage = Storage(root)
    path = Path(out or (Path(storage.root, "card.png") if storage.is_local else "card.png"))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_card(rows, storage=storage, path=path)
    print(f"picture    {path}")


def describe(index: Index) -> Iterator[str]:
    """Yield the lines of the card."""
    yield f"dataset    {index.root}"
    for kind, name in (("clip", "recordings"), ("latents", "encoded windows")):
        rows = [row for row in index.rows if row.kind == kind and row.valid]
        if rows:
            yield from _describe_kind(rows, name=name)
    yield from _problems(index)


def _describe_kind(rows: Sequence[Row], *, name: str) -> Iterator[str]:
    seconds = np.array([row.num_frames / row.fps for row in rows])
    scenes = len({row.scene for row in rows})
    yield f"{name}: {len(rows)} in {scenes} scenes, {seconds.sum() / 60:.1f} min, {_bytes(rows)}"
    yield f"  length   median {np.median(seconds):.1f} s, {seconds.min():.1f} to {seconds.max():.1f} s"
    yield f"  size     {_counted(f'{row.height}x{row.width}' for row in rows)}"
    yield f"  fps      {_counted(f'{row.fps:g}' for row in rows)}"
    moving = [row.d_bar for row in rows if row.translates]
    yield (
        f"  motion   d_bar median {np.median(moving) if moving else 1.0:.4g} scene units a frame "
        f"({len(rows) - len(moving)} never translate), mean turn "
        f"{np.mean([row.turn_deg for row in rows]):.2f} degrees a frame"
    )
    gaps = [row.revisit_gap_s for row in rows if row.revisit_gap_s > 0]
    share = np.mean([row.revisit_share for row in rows])
    yield (
        f"  revisits {share:.1%} of looks see an earlier view again after "
        f"{AWAY_S:g} s or more; {len(gaps)} of {len(rows)} samples do"
        + (f", longest absence median {np.median(gaps):.1f} s, at most {max(gaps):.1f} s" if gaps else "")
    )
    if turned := sum(row.pivot is not None for row in rows):
        yield f"  reversed {turned} of {len(rows)} turn back in time"
    if hashes := Counter(row.vae_sha256[:12] for row in rows if row.vae_sha256):
        yield f"  vae      {', '.join(f'{name}... ({count})' for name, count in hashes.most_common())}"
    captions = sorted({caption for row in rows for caption in row.captions})
    yield f"  captions {len(captions)} different, e.g. {'; '.join(repr(c) for c in captions[:3]) or 'none'}"
    shares = action_shares(rows)
    yield "  actions  share of motion, measured in held keys"
    for channel in np.argsort(-shares):
        bar = "#" * round(40 * shares[channel])
        yield f"    {CHANNELS[channel]:<13} {shares[channel]:6.1%} {bar}"
    yield f"  largest  {shares.max():.1%} ({CHANNELS[int(shares.argmax())]})"


def action_shares(rows: Sequence[Row]) -> np.ndarray:
    """Return each channel's share (13,) of all motion, in frames of a held key."""
    total = sum((row.action_sums.sum(0) / UNITS for row in rows), np.zeros(len(CHANNELS)))
    return total / max(total.sum(), 1e-12)


def _problems(index: Index) -> Iterator[str]:
    problems = [f"{row.key} in {row.shard}: {row.reason}" for row in index.invalid()]
    problems += [f"{shard} is damaged: {reason}" for shard, reason in index.damaged.items()]
    try:
        index.check_shards()
    except (FileNotFoundError, ValueError) as error:
        problems.append(str(error))
    yield f"problems   {len(problems) or 'none'}"
    yield from (f"  {problem}" for problem in problems)


def _bytes(rows: Sequence[Row]) -> str:
    size = sum(length for row in rows for _, length in row.ranges.values())
    return f"{size / 2**20:.1f} MiB"


def _counted(values: Iterator[str]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(5))


def draw_card(rows: Sequence[Row], *, storage: Storage, path: Path) -> None:
    """Draw the card of valid samples to a PNG."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install matplotlib.") from error
    frames = _frames(rows, storage)
    figure = Figure(figsize=(14, 11.5 if frames else 7.6), facecolor="white")
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))  # inches
    ratios = [7.2, 3.9] if frames else [1.0]
    top, *rest = figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    axes = top.subplots(2, 2)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(MUTED)
        ax.tick_params(colors=MUTED, labelsize=9)
        ax.set_axisbelow(True)
    _lengths(axes[0, 0], rows)
    _balance(axes[0, 1], rows)
    _paths(axes[1, 0], rows, storage)
    _revisits(axes[1, 1], rows)
    minutes = sum(row.num_frames / row.fps for row in rows) / 60
    scenes = len({row.scene for row in rows})
    top.suptitle(
        f"{Path(storage.root).name}: {len(rows)} samples, {scenes} scenes, {minutes:.1f} min",
        x=0.01, ha="left", color=INK, fontsize=15, fontweight="bold",
    )  # fmt: skip
    if frames:
        _sheet(rest[0], frames)
    figure.savefig(path, dpi=110)


def _title(ax: Any, title: str, *, x: str, y: str = "") -> None:
    ax.set_title(title, loc="left", color=INK, fontsize=11.5)
    ax.set_xlabel(x, color=MUTED, fontsize=9.5)
    ax.set_ylabel(y, color=MUTED, fontsize=9.5)


def _lengths(ax: Any, rows: Sequence[Row]) -> None:
    seconds = np.array([row.num_frames / row.fps for row in rows])
    ax.grid(axis="y", color=GRID)
    ax.hist(seconds, bins=min(40, max(8, len(rows) // 4)), color=MOVE, edgecolor="white", linewidth=0.8)
    ax.axvline(float(np.median(seconds)), color=TURN, linewidth=1.6)
    _title(ax, f"Lengths (median {np.median(seconds):.1f} s)", x="seconds", y="samples")


def _balance(ax: Any, rows: Sequence[Row]) -> None:
    shares = 100 * action_shares(rows)
    colours = [MOVE] * 6 + [TURN] * 6 + [REST]
    places = np.arange(len(CHANNELS))[::-1]
    ax.barh(places, shares, color=colours, height=0.72)
    for place, share in zip(places, shares, strict=True):
        ax.text(share + 0.012 * shares.max(), place, f"{share:.1f}", va="center", color=MUTED, fontsize=8.5)
    ax.set_yticks(places, [name.replace("_", " ") for name in CHANNELS])
    ax.grid(axis="x", color=GRID)
    ax.set_xlim(0, 1.12 * max(shares.max(), 1e-6))
    _title(ax, f"Action balance (largest {shares.max():.1f} %)", x="% of motion, in held keys")


def _paths(ax: Any, rows: Sequence[Row], storage: Storage) -> None:
    from matplotlib import colormaps

    chosen = _spread(rows, PATHS)
    for number, row in enumerate(chosen):
        try:
            position = _positions(row, storage)
        except (ValueError, OSError) as error:
            print(f"unreadable {row.key} in {row.shard}: {error}")
            continue
        colour = colormaps["viridis"](0.05 + 0.85 * number / max(1, len(chosen) - 1))
        ax.plot(position[:, 0], position[:, 2], color=colour, linewidth=1.1, alpha=0.8)
        ax.plot(*position[-1, [0, 2]], marker="o", markersize=2.6, color=colour)
    ax.plot(0, 0, marker="+", color=INK, markersize=9, zorder=5)
    ax.set_aspect("equal", adjustable="datalim")
    ax.grid(color=GRID)
    title = f"Paths from above ({len(chosen)} of {len(rows)}, from one start)"
    _title(ax, title, x="right, in mean steps", y="forward")


def _revisits(ax: Any, rows: Sequence[Row]) -> None:
    gaps = np.array([row.revisit_gap_s for row in rows])
    back = gaps[gaps > 0]
    ax.grid(axis="y", color=GRID)
    if len(back):
        bins = min(30, max(8, len(back) // 3))
        ax.hist(back, bins=bins, color=TURN, edgecolor="white", linewidth=0.8)
    else:
        ax.text(0.5, 0.5, "no view comes back", ha="center", color=MUTED, transform=ax.transAxes)
    title = f"Longest absence before a view comes back ({len(back)} of {len(rows)} samples)"
    _title(ax, title, x="seconds away", y="samples")


def _sheet(figure: Any, frames: Sequence[tuple[str, np.ndarray]]) -> None:
    axes = figure.subplots(*SHEET, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (scene, frame) in zip(axes.flat, frames, strict=False):
        ax.imshow(frame, interpolation="lanczos" if frame.shape[0] < 200 else None)
        ax.set_title(scene[:28], fontsize=8.5, color=MUTED, pad=3)


def _frames(rows: Sequence[Row], storage: Storage) -> list[tuple[str, np.ndarray]]:
    """Decode the middle frame of a few recordings of different scenes; an unreadable one is left out."""
    frames = []
    recordings = [row for row in rows if VIDEO in row.ranges]
    for row in _spread(recordings, SHEET[0] * SHEET[1]):
        offset, length = row.ranges[VIDEO]
        middle = row.num_frames // 2
        try:
            file = storage.open_range(row.shard, offset=offset, length=length)
            frames.append((row.scene, decode_video(file, start=middle, stop=middle + 1)[0]))
        except (ValueError, OSError) as error:
            print(f"unreadable {row.key} in {row.shard}: {error}")
    return frames


def _positions(row: Row, storage: Storage) -> np.ndarray:
    """Return camera positions (f, 3) from the first frame's camera, in d_bar."""
    name = C2W if C2W in row.ranges else ACTIONS
    offset, length = row.ranges[name]
    data = storage.read(row.shard, offset=offset, length=length)
    array = torch.from_numpy(load_array(data, key=row.key)).double()
    if name == ACTIONS:
        return integrate(array)[:, :3, 3].numpy()
    return ((array[:, :3, 3] - array[0, :3, 3]) @ array[0, :3, :3] / row.d_bar).numpy()


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Take up to `count` samples, one of every scene before a second of any."""
    turns: dict[str, int] = {}
    ranked = []
    for row in rows:
        turns[row.scene] = turns.get(row.scene, -1) + 1
        ranked.append((turns[row.scene], row.scene, row.key, row))
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:3])[:count]]
