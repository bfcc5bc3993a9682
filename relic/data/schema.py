"""What a sample in a shard is: its members, its versioned description, and how arrays become bytes.

A shard is an uncompressed tar in webdataset's naming, `{key}.{member}`. Two kinds of sample:

- a recording, "relic-clip/1": `mp4`, `c2w.npy` (f, 4, 4) float64, `json`;
- encoded training windows, "relic-latents/1": `latents.npy` (t, c, h, w) float16 and/or `trajectory.npy`
  (s, t, c, h, w) float16, `actions.npy` (f, 13) float32, `json`, and, where prompts are embedded beforehand,
  `text.npy` (n, d) float16. The description of a trajectory also names the noise `levels` of its states; the
  last state is clean and has none.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

__all__ = [
    "ACTIONS",
    "C2W",
    "CLIP_SCHEMA",
    "JSON",
    "LATENTS",
    "LATENTS_SCHEMA",
    "TEXT",
    "TRAJECTORY",
    "VIDEO",
    "check_key",
    "dump_array",
    "dump_json",
    "load_array",
    "load_json",
]

CLIP_SCHEMA: Final = "relic-clip/1"
LATENTS_SCHEMA: Final = "relic-latents/1"

VIDEO: Final = "mp4"
C2W: Final = "c2w.npy"
LATENTS: Final = "latents.npy"
TRAJECTORY: Final = "trajectory.npy"
ACTIONS: Final = "actions.npy"
TEXT: Final = "text.npy"
JSON: Final = "json"

FIELDS: Final = {  # of the description, by schema
    CLIP_SCHEMA: (
        "num_frames", "fps", "height", "width", "intrinsics_px", "d_bar", "translates", "captions",
        "provenance",
    ),
    LATENTS_SCHEMA: (
        "num_frames", "fps", "height", "width", "d_bar", "caption", "scene", "source", "start", "pivot",
        "vae_sha256",
    ),
}  # fmt: skip


def check_key(key: str) -> None:
    """Raise ValueError unless `key` names a sample: webdataset cuts names at the first dot."""
    if not re.fullmatch(r"[A-Za-z0-9_+=@-]+", key):
        raise ValueError(
            f"sample key {key!r} must be letters, digits and _+=@- (a dot or a slash would split the name)."
        )


def dump_json(description: Mapping[str, Any]) -> bytes:
    """Return a description as JSON bytes, the same for equal values."""
    try:
        return json.dumps(description, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the description of a sample must be plain finite JSON values: {error}") from error


def load_json(data: bytes, *, schema: str, key: str = "sample") -> dict[str, Any]:
    """Parse a description and check its schema.

    Raises:
        ValueError: If it is no JSON, of an older or unknown schema, or lacks a field.
    """
    try:
        description = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{key}.json is not readable JSON: {error}") from error
    found = description.get("schema") if isinstance(description, dict) else None
    if found != schema:
        raise ValueError(
            f"{key}.json has schema {found!r}, this version of relic reads {schema!r}; "
            "make the shards again with this version, or read them with the one that wrote them."
        )
    missing = [field for field in FIELDS[schema] if field not in description]
    if missing:
        raise ValueError(f"{key}.json ({schema}) lacks {', '.join(missing)}.")
    return description


def dump_array(array: np.ndarray) -> bytes:
    """Return an array as .npy bytes."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def load_array(data: bytes, *, key: str = "array") -> np.ndarray:
    """Read .npy bytes, never pickled objects.

    Raises:
        ValueError: If the bytes are damaged.
    """
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise ValueError(f"{key} is not a readable .npy array: {error}") from error
