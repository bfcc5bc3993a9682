"""Which samples of an index can be read in the shape that is asked for, and what to say when they cannot."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from relic.data.augment import stride_between
from relic.data.collate import Content
from relic.data.index import Index, Row
from relic.data.sampling import Split, Windows, split_scenes
from relic.data.schema import LATENTS, TRAJECTORY, VIDEO
from relic.types import ClipSpec

__all__ = ["check_shape", "check_vae", "file_sha256", "lay_out", "levels_of", "rows_of", "split_rows"]


def rows_of(index: Index, *, content: Content) -> tuple[Row, ...]:
    """Return the usable samples that hold `content`.

    Raises:
        ValueError: If there is none, saying what there is.
    """
    member = {"video": VIDEO, "latents": LATENTS, "trajectory": TRAJECTORY}[content]
    rows = tuple(row for row in index.rows if row.valid and member in row.ranges)
    if not rows:
        there = sorted({name for row in index.rows for name in row.ranges})
        reasons = sorted({f"{row.key}: {row.reason}" for row in index.invalid()})[:5]
        how = {"video": "`relic render`", "latents": "`relic encode`", "trajectory": "`relic ode-pairs`"}[
            content
        ]
        raise ValueError(
            f"{index.root} holds no usable {member}, which content={content!r} needs ({how} writes it); it "
            f"holds {', '.join(there) or 'nothing'}"
            + (f"; invalid: {'; '.join(reasons)}." if reasons else ".")
        )
    return rows


def split_rows(
    rows: Sequence[Row],
    *,
    scenes: Sequence[str],
    split: Split,
    validation_scenes: int,
    evaluation_scenes: int,
) -> tuple[Row, ...]:
    """Return the samples of a split. scenes: all that there are, from the index; `rows` may lack some.

    Raises:
        ValueError: If holding scenes out leaves the split empty.
    """
    splits = split_scenes(scenes, validation_scenes=validation_scenes, evaluation_scenes=evaluation_scenes)
    chosen = tuple(row for row in rows if splits[row.scene] == split)
    if not chosen:
        raise ValueError(
            f"no samples are left for {split}: the dataset has {len(scenes)} scenes, of which "
            f"evaluation_scenes={evaluation_scenes} are held out first and validation_scenes="
            f"{validation_scenes} next; change these numbers or record more scenes."
        )
    return chosen


def check_shape(rows: Sequence[Row], *, clip: ClipSpec, content: Content) -> None:
    """Check that samples have, or can be brought to, the size and rate of `clip`.

    Frames may be scaled down at the same aspect and every n-th taken; latents must fit exactly.

    Raises:
        ValueError: Naming a sample that does not.
    """
    for row in rows:
        where = f"{row.key} in {row.shard}"
        try:
            stride = stride_between(row.fps, clip.fps)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        asked, stored = f"{clip.height}x{clip.width}", f"{row.height}x{row.width}"
        if content != "video":
            if asked != stored or stride != 1:
                raise ValueError(
                    f"{where} was encoded from {stored} at {row.fps:g} fps, the clip asked for is {asked} at "
                    f"{clip.fps}; latents cannot be resized: encode again so."
                )
        elif row.height * clip.width != row.width * clip.height or row.height < clip.height:
            raise ValueError(
                f"{where} is {stored}, the clip asked for is {asked}; frames are only scaled down, at "
                "the same aspect: set clip.height and clip.width to match, or crop when importing."
            )


def check_vae(rows: Sequence[Row], *, vae: str) -> None:
    """Check that latents come from the VAE weights in the file `vae`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a sample was encoded by other weights.
    """
    if not Path(vae).is_file():
        raise FileNotFoundError(f"vae={vae}: no such file; it must be the weights that encoded the latents.")
    found = file_sha256(vae)
    for row in rows:
        if row.vae_sha256 != found:
            raise ValueError(
                f"{row.key} in {row.shard} was encoded by a VAE with sha256 {row.vae_sha256}, but "
                f"vae={vae} has {found}; give that VAE, or encode the recordings again with this one."
            )


def levels_of(rows: Sequence[Row]) -> tuple[float, ...]:
    """Return the noise levels of the states of trajectories.

    Raises:
        ValueError: If they differ, naming two samples.
    """
    first = rows[0]
    for row in rows:
        if row.levels != first.levels:
            raise ValueError(
                f"{row.key} in {row.shard} has states at levels {row.levels}, {first.key} in {first.shard} "
                f"at {first.levels}: they cannot be trained on together; keep them in folders of their own."
            )
    return first.levels


def lay_out(rows: Sequence[Row], *, num_frames: int, fps: float, balance: float) -> Windows:
    """Return the windows of `num_frames` in samples.

    Raises:
        ValueError: If every sample is too short, saying how long the longest is.
    """
    windows = Windows.of(rows, num_frames=num_frames, fps=fps, balance=balance)
    if not len(windows):
        longest = max(rows, key=lambda row: row.num_frames / row.fps)
        frames = (longest.num_frames - 1) // stride_between(longest.fps, fps) + 1
        raise ValueError(
            f"a horizon of {num_frames} frames is longer than every one of the {len(rows)} samples; the "
            f"longest, {longest.key}, has {frames} at {fps:g} fps: shorten clip.horizons or record longer."
        )
    return windows


def file_sha256(path: str | Path) -> str:
    """Hash a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
