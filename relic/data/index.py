"""The index of a dataset: one Parquet row a sample, with where its bytes lie and what can be selected by.

Training never scans shards: it selects rows here and reads byte ranges. Writing reads every description,
pose and action array, and of videos the header; problems are recorded in the row, not raised.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from relic.data.describe import describe_sample
from relic.data.schema import ACTIONS, C2W, JSON, LATENTS, TEXT, TRAJECTORY, VIDEO
from relic.data.shards import Member, scan_shard
from relic.data.storage import Storage
from relic.ops.actions import CHANNELS

__all__ = ["INDEX_NAME", "INDEX_SCHEMA", "Index", "Row", "write_index"]

INDEX_NAME: Final = "index.parquet"
INDEX_SCHEMA: Final = "relic-index/2"

# column names of the byte ranges: {column}_offset, {column}_length
COLUMNS: Final = {
    VIDEO: "video",
    C2W: "c2w",
    JSON: "json",
    LATENTS: "latents",
    TRAJECTORY: "trajectory",
    ACTIONS: "actions",
    TEXT: "text",
}

TABLE: Final = pa.schema(
    [
        ("key", pa.string()),
        ("scene", pa.string()),
        ("shard", pa.string()),
        ("kind", pa.string()),
        ("valid", pa.bool_()),
        ("reason", pa.string()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("d_bar", pa.float64()),
        ("translates", pa.bool_()),
        ("captions", pa.list_(pa.string())),
        ("action_sums", pa.list_(pa.float32())),
        ("speed", pa.float64()),
        ("turn_deg", pa.float64()),
        ("revisit_share", pa.float64()),
        ("revisit_gap_s", pa.float64()),
        ("source", pa.string()),
        ("start", pa.int32()),
        ("pivot", pa.int32()),
        ("vae_sha256", pa.string()),
        ("levels", pa.list_(pa.float64())),
        *((f"{column}_{part}", pa.int64()) for column in COLUMNS.values() for part in ("offset", "length")),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample of the index.

    Args:
        key: Name of the sample, unique in the dataset.
        scene: Where it was recorded; the unit of holding out.
        shard: Path of the tar, relative to the root.
        kind: "clip" or "latents".
        valid: Whether training may use it; `reason` says why not.
        reason: Empty for a valid sample.
        num_frames: Pixel frames.
        fps: Frames a second.
        height: Pixel rows.
        width: Pixel columns.
        d_bar: Mean moving step of the source recording, scene units a frame.
        translates: Whether the recording moves at all.
        captions: One per 5-s segment.
        action_sums: (seconds, 13) float32, actions summed over each second (the last may be short).
        speed: Mean translation, d_bar a frame.
        turn_deg: Mean turn, degrees a frame.
        revisit_share: Share of frames that come back to an earlier view after at least 2 s away.
        revisit_gap_s: The longest such absence in seconds; 0 for none.
        source: Key of the encoded recording (latents only, else empty), from frame `start`.
        start: First frame of the window in its source.
        pivot: Frame count before time turns back, None for a forward window.
        vae_sha256: Hash of the VAE weights that encoded it (latents only, else empty).
        levels: Noise levels of the states of a trajectory, its clean end excluded; else empty.
        ranges: (offset, length) in the shard, by member name.
    """

    key: str
    scene: str
    shard: str
    kind: str
    valid: bool
    reason: str
    num_frames: int
    fps: float
    height: int
    width: int
    d_bar: float
    translates: bool
    captions: tuple[str, ...]
    action_sums: np.ndarray = field(compare=False)
    speed: float
    turn_deg: float
    revisit_share: float
    revisit_gap_s: float
    source: str
    start: int
    pivot: int | None
    vae_sha256: str
    levels: tuple[float, ...]
    ranges: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Index:
    """The samples of a dataset, sorted by key, so that nothing depends on how they are spread over shards.

    Args:
        root: Folder or fsspec URL of the dataset.
        rows: All samples, the invalid ones too.
        scenes: All scenes that the recordings came from, also those of which nothing is in `rows`: scenes are
            held out from among these, so that data made of the same recordings hold out the same ones.
        damaged: What is wrong with each damaged shard; its readable samples are in `rows`.
    """

    root: str
    rows: tuple[Row, ...]
    scenes: tuple[str, ...]
    damaged: Mapping[str, str]

    @classmethod
    def open(cls, root: str | Path) -> Index:
        """Read the index of the dataset at `root`, a folder or fsspec URL, and check its shards.

        Raises:
            FileNotFoundError: If the folder, the index or shards are missing; shards are listed.
            ValueError: If the index has another schema, or a shard is shorter than indexed.
        """
        index = cls.read(root)
        index.check_shards()
        return index

    @classmethod
    def read(cls, root: str | Path) -> Index:
        """Read the index alone, as `open` does, without looking at the shards."""
        storage = Storage(root)
        if not storage.exists(INDEX_NAME):
            if not storage.exists(""):
                raise FileNotFoundError(f"no dataset at {root}: the folder does not exist.")
            raise FileNotFoundError(
                f"{root} has no {INDEX_NAME}; shards are expected in {root}/shards/*.tar: "
                "write the index with relic.data.write_index(root)."
            )
        table = pq.read_table(pa.BufferReader(storage.read(INDEX_NAME)))
        metadata = table.schema.metadata or {}
        found = metadata.get(b"relic.schema", b"").decode()
        if found != INDEX_SCHEMA:
            raise ValueError(
                f"{root}/{INDEX_NAME} has schema {found!r}, this version of relic reads {INDEX_SCHEMA!r}; "
                "write it again with relic.data.write_index(root)."
            )
        rows = tuple(_row(values) for values in table.to_pylist())
        scenes = tuple(json.loads(metadata[b"relic.scenes"]))
        return cls(str(root), rows, scenes, json.loads(metadata[b"relic.damaged"]))

    def invalid(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.valid)

    def check_shards(self) -> None:
        """Raise, listing them, if shards are missing or shorter than indexed."""
        storage = Storage(self.root)
        needed: dict[str, int] = defaultdict(int)
        for row in self.rows:
            ends = [offset + length for offset, length in row.ranges.values()]
            needed[row.shard] = max([needed[row.shard], *ends])
        sizes = {shard: storage.size(shard) for shard in needed}
        missing = sorted(shard for shard, size in sizes.items() if size is None)
        if missing:
            raise FileNotFoundError(
                f"{self.root}: {len(missing)} of {len(needed)} indexed shards are missing: {_some(missing)}; "
                "bring them back, or write the index again with relic.data.write_index(root)."
            )
        short = sorted(shard for shard, size in sizes.items() if size is not None and size < needed[shard])
        if short:
            raise ValueError(
                f"{self.root}: shards shorter than the index says: {_some(short)}; "
                "copy them again, or write the index again with relic.data.write_index(root)."
            )


def write_index(root: Path, *, scenes: Iterable[str] = ()) -> Path:
    """Write `root/index.parquet` from `root/shards/*.tar`, atomic, the same bytes for the same shards.

    Samples that training must not use (NaN, non-rigid or mirrored poses, counts that disagree, unreadable
    members, a key used twice) get `valid=False` and a `reason`. Of a damaged shard the whole samples are
    kept, the shard is named in a warning and in `Index.damaged`.

    Args:
        root: The folder.
        scenes: Scenes of the source that may have left no sample here; those of an index that is written
            again are kept.

    Returns:
        The path of the index.

    Raises:
        FileNotFoundError: If there is no shard.
    """
    root = Path(root)
    shards = sorted((root / "shards").glob("*.tar"))
    if not shards:
        raise FileNotFoundError(
            f"{root / 'shards'} holds no *.tar; `relic render` or an importer writes them."
        )
    rows: list[dict[str, Any]] = []
    damaged: dict[str, str] = {}
    for path in shards:
        shard = path.relative_to(root).as_posix()
        samples: dict[str, list[Member]] = defaultdict(list)
        try:
            for member in scan_shard(path):
                samples[member.key].append(member)
        except ValueError as error:
            damaged[shard] = str(error)
            warnings.warn(
                f"{error} Its whole samples are indexed; copy or write it again, then the index.",
                stacklevel=2,
            )
        with path.open("rb") as file:
            for key, members in samples.items():
                row = describe_sample(file, members)
                row |= {"key": key, "shard": shard}
                for member in members:
                    if column := COLUMNS.get(member.name):
                        row |= {f"{column}_offset": member.offset, f"{column}_length": member.length}
                rows.append(row)
    _mark_duplicates(rows)
    rows.sort(key=lambda row: (row["key"], row["shard"]))
    known = {row["scene"] for row in rows if row.get("scene")} | set(scenes) | _scenes_before(root)
    metadata = {
        "relic.schema": INDEX_SCHEMA,
        "relic.scenes": json.dumps(sorted(known)),
        "relic.damaged": json.dumps(damaged, sort_keys=True),
    }
    columns = {name: [row.get(name) for row in rows] for name in TABLE.names}
    table = pa.Table.from_pydict(columns, schema=TABLE.with_metadata(metadata))
    return _replace(table, root / INDEX_NAME)


def _scenes_before(root: Path) -> set[str]:
    """Return the scenes that the index about to be replaced knows."""
    path = root / INDEX_NAME
    if not path.exists():
        return set()
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError):  # damaged, which is why it is written again
        return set()
    return set(json.loads(metadata.get(b"relic.scenes", b"[]")))


def _mark_duplicates(rows: list[dict[str, Any]]) -> None:
    first: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["shard"]):
        if row["key"] in first:
            row |= {"valid": False, "reason": f"the key is already in {first[row['key']]}"}
        else:
            first[row["key"]] = row["shard"]


def _replace(table: pa.Table, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    return path


def _row(values: dict[str, Any]) -> Row:
    ranges = {}
    for member, column in COLUMNS.items():
        offset, length = values.pop(f"{column}_offset"), values.pop(f"{column}_length")
        if offset is not None:
            ranges[member] = (offset, length)
    values["captions"] = tuple(values["captions"])
    values["levels"] = tuple(values.get("levels") or ())  # indexes of before trajectories have no such column
    values["action_sums"] = np.asarray(values["action_sums"], np.float32).reshape(-1, len(CHANNELS))
    return Row(ranges=ranges, **values)


def _some(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
