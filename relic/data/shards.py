"""Samples in tars: pack a recording, write a shard atomically, read it back."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relic.data.schema import (
    C2W,
    CLIP_SCHEMA,
    JSON,
    VIDEO,
    check_key,
    dump_array,
    dump_json,
    load_array,
    load_json,
)
from relic.data.video import decode_video, encode_video
from relic.ops.actions import mean_step
from relic.ops.camera import check_rigid
from relic.types import Clip

__all__ = ["Member", "pack_clip", "pack_sample", "read_clip", "scan_shard", "unpack_sample", "write_shard"]


class Member(NamedTuple):
    """Where one file of a sample lies: `{key}.{name}` at `offset`, `length` bytes long."""

    key: str
    name: str
    offset: int
    length: int


def pack_sample(
    *,
    frames: Iterable[np.ndarray],
    c2w: Tensor,
    intrinsics_px: Tensor,
    fps: float,
    captions: tuple[str, ...],
    provenance: Mapping[str, Any],
) -> dict[str, bytes]:
    """Pack a recording into the members of a sample. Frames stream into the encoder; the video is never held.

    Args:
        frames: Each (h, w, 3) uint8 RGB, as many as poses.
        c2w: (f, 4, 4) camera to world, OpenCV axes.
        intrinsics_px: (4,) `fx fy cx cy` in pixels.
        fps: Frames a second.
        captions: One per 5-s segment, static content only.
        provenance: Plain JSON values; must name the `scene`, by which recordings are held out.

    Raises:
        ValueError: If a pose is not rigid, counts differ, a frame has another shape, or the scene is not
            named.
    """
    check_rigid(c2w)
    if c2w.ndim != 3:
        raise ValueError(f"c2w has shape {tuple(c2w.shape)}; a recording's poses are (f, 4, 4).")
    if intrinsics_px.shape != (4,) or not bool(intrinsics_px.isfinite().all()):
        raise ValueError(f"intrinsics_px must be four finite numbers fx fy cx cy, got {intrinsics_px}.")
    if not fps > 0:
        raise ValueError(f"fps={fps} must be positive.")
    if not str(provenance.get("scene", "")):
        raise ValueError(
            'provenance must name the "scene" (recordings are held out by scene); '
            f"it has {sorted(provenance)}."
        )
    video, (num_frames, height, width) = encode_video(frames, fps=fps)
    if num_frames != len(c2w):
        raise ValueError(f"{num_frames} frames but {len(c2w)} poses; a recording has one pose a frame.")
    d_bar, translates = mean_step(c2w)
    description = {
        "schema": CLIP_SCHEMA,
        "num_frames": num_frames,
        "fps": float(fps),
        "height": height,
        "width": width,
        "intrinsics_px": [float(value) for value in intrinsics_px],
        "d_bar": d_bar,
        "translates": translates,
        "captions": list(captions),
        "provenance": dict(provenance),
    }
    return {
        VIDEO: video,
        C2W: dump_array(c2w.detach().cpu().double().numpy()),
        JSON: dump_json(description),
    }


def pack_clip(clip: Clip) -> dict[str, bytes]:
    """Pack a whole recording held in memory; its d_bar is computed anew from its poses."""
    return pack_sample(
        frames=iter(clip.video.numpy()),
        c2w=clip.c2w,
        intrinsics_px=clip.intrinsics_px,
        fps=clip.fps,
        captions=clip.captions,
        provenance=clip.provenance,
    )


def unpack_sample(members: Mapping[str, bytes]) -> Clip:
    """Rebuild a recording from its members, video decoded in whole.

    Raises:
        ValueError: If a member is missing or damaged, or the schema is another.
    """
    missing = [name for name in (VIDEO, C2W, JSON) if name not in members]
    if missing:
        raise ValueError(f"a recording needs {VIDEO}, {C2W} and {JSON}; missing: {', '.join(missing)}.")
    description = load_json(members[JSON], schema=CLIP_SCHEMA)
    c2w = torch.from_numpy(load_array(members[C2W], key=C2W)).double()
    video = torch.from_numpy(decode_video(members[VIDEO]))
    if not len(video) == len(c2w) == description["num_frames"]:
        raise ValueError(
            f"{len(video)} frames, {len(c2w)} poses, num_frames={description['num_frames']}; all must agree."
        )
    return Clip(
        video=video,
        c2w=c2w,
        intrinsics_px=torch.tensor(description["intrinsics_px"], dtype=torch.float64),
        fps=description["fps"],
        d_bar=description["d_bar"],
        captions=tuple(description["captions"]),
        provenance=description["provenance"],
    )


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write samples, (key, members by name), to a tar that appears whole or not at all.

    Samples are taken one at a time, so a generator may render while the shard is written. The bytes depend
    on the samples alone: no times, owners or modes.

    Raises:
        ValueError: If a key is malformed, comes twice, or a sample has no member.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                seen: set[str] = set()
                for key, members in samples:
                    check_key(key)
                    if key in seen or not members:
                        raise ValueError(
                            f"sample {key!r} {'comes twice' if key in seen else 'is empty'} in {path.name}."
                        )
                    seen.add(key)
                    for name in sorted(members):
                        header = tarfile.TarInfo(f"{key}.{name}")  # mtime, uid and gid are 0 by default
                        header.size = len(members[name])
                        tar.addfile(header, io.BytesIO(members[name]))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def scan_shard(path: Path) -> Iterator[Member]:
    """Yield the members of a shard in order, reading headers only.

    Raises:
        ValueError: After the last whole member, if the tar is damaged or cut short.
    """
    size = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for header in tar:
                if header.isfile():
                    key, _, name = header.name.rpartition("/")[2].partition(".")
                    if header.offset_data + header.size > size:
                        raise ValueError(f"{path.name} is cut short inside {header.name}.")
                    yield Member(key, name, header.offset_data, header.size)
                    end = header.offset_data + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except tarfile.TarError as error:
        raise ValueError(f"{path.name} is damaged after byte {end}: {error}.") from error
    with path.open("rb") as file:
        file.seek(end)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise ValueError(f"{path.name} is cut short: no end mark at byte {end}.")


def read_clip(path: Path, key: str) -> Clip:
    """Read one whole recording of a shard by its key.

    Raises:
        KeyError: If the shard has no such recording.
        ValueError: If the recording is damaged.
    """
    path = Path(path)
    places = [member for member in scan_shard(path) if member.key == key]
    if not places:
        raise KeyError(f"{path} has no sample {key!r}.")
    members = {}
    with path.open("rb") as file:
        for member in places:
            file.seek(member.offset)
            members[member.name] = file.read(member.length)
    return unpack_sample(members)
