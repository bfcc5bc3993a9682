"""A folder that is filled shard by shard: what it is made with, for a stopped run to go on alike."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from relic.data.index import INDEX_NAME

__all__ = ["alone", "claim", "in_turn", "remove_leftovers"]


@contextmanager
def alone(root: Path, *, part: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Hold a folder, so that two runs do not write the same files; a killed run lets go by itself.

    part: (i, n) is one of n runs that share the work: each part is held by one run, the whole by none then.
        Runs that share it otherwise are not kept apart; what they write must bear being written twice.

    Raises:
        ValueError: If another run holds it, or there is no such part.
    """
    number, parts = part
    if not 0 <= number < parts:
        raise ValueError(f"part={number} {parts} must be one of {parts} parts, counted from 0.")
    root.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    with ExitStack() as held:
        held.enter_context(_locked(root / ".lock", shared=parts > 1))
        if parts > 1:
            held.enter_context(_locked(root / f".lock-{number}-{parts}", shared=False))
        yield


@contextmanager
def in_turn(root: Path) -> Iterator[None]:
    """Wait until no other run is inside: for what parts of a run must not do at the same time."""
    root.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (root / ".lock-turn").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _locked(path: Path, *, shared: bool) -> Iterator[None]:
    import fcntl

    with path.open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {path.parent}; wait for it or stop it.") from error
        yield


def claim(out: Path, description: Mapping[str, Any], *, file: str, meaning: Mapping[str, str]) -> None:
    """Write down in `out/file` what the folder is made with, or check that it was begun with the same.

    description: plain JSON values that decide every byte. meaning: of values that are hashes, what to say of
    another one.

    Raises:
        ValueError: Naming what differs, or if something else lies there.
    """
    with in_turn(out):
        _claim(out / file, description, meaning=meaning)


def _claim(path: Path, description: Mapping[str, Any], *, meaning: Mapping[str, str]) -> None:
    out = path.parent
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
