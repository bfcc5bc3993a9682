"""A folder that is filled shard by shard: what it is made with, for a stopped run to go on alike."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relic.data.index import INDEX_NAME

__all__ = ["claim", "remove_leftovers"]


def claim(out: Path, description: Mapping[str, Any], *, file: str, meaning: Mapping[str, str]) -> None:
    """Write down in `out/file` what the folder is made with, or check that it was begun with the same.

    description: plain JSON values that decide every byte. meaning: of values that are hashes, what to say of
    another one.

    Raises:
        ValueError: Naming what differs, or if something else lies there.
    """
    path = out / file
    if not path.exists():
        if any(out.glob("shards/*.tar")) or (out / INDEX_NAME).exists():
            raise ValueError(f"{out} holds a dataset that was not made here; give an empty folder.")
        out.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
        temporary.replace(path)
        return
    found = json.loads(path.read_text())
    for name, value in description.items():
        if found.get(name) != value:
            what = meaning.get(name, f"{name}={found.get(name)}, not {value}")
            raise ValueError(
                f"{out} was begun with {what} ({name} differs); give the same arguments to go on, or another "
                "folder."
            )


def remove_leftovers(shard: Path) -> None:
    """Remove what killed runs left of a shard."""
    for leftover in shard.parent.glob(f".{shard.name}.*.tmp"):
        leftover.unlink()
