"""Read tensors from disk lazily: first what there is, from the headers; then one tensor, or a slice of one,
at a time.

Only one file is open while streaming, so that the host never holds more than one of them.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = [
    "Renamed",
    "SafetensorsFiles",
    "Stored",
    "Tensors",
    "TensorsInMemory",
    "load_torch_dict",
    "part",
    "read_config",
]

Span = tuple[slice, ...]
Read = Callable[[Span | None], Tensor]
INDEX = ".safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Stored(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Tensors(ABC):
    """Named tensors that are read when asked for.

    entries: shape and dtype by name; container: what they lie in, in words.
    """

    entries: Mapping[str, Stored]
    container: str

    @abstractmethod
    def stream(self) -> Iterator[tuple[str, Read]]:
        """Yield each name with a function that reads its tensor, or only a span of it; files come one after
        the other.

        What is read may be a view of the file: copy it before the next name is asked for.
        """


class TensorsInMemory(Tensors):
    """Tensors of a dict: a network's state, or a torch file that is mapped into memory."""

    def __init__(self, tensors: Mapping[str, Tensor], *, container: str = "memory") -> None:
        self.tensors = tensors
        self.entries = {name: Stored(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        self.container = container

    def stream(self) -> Iterator[tuple[str, Read]]:
        for name, tensor in self.tensors.items():
            yield name, partial(part, tensor.detach())


def part(tensor: Tensor, span: Span | None) -> Tensor:
    """Return a span of a tensor, or all of it."""
    return tensor if span is None else tensor[span]


class Renamed(Tensors):
    """Tensors of a file under other names."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str]) -> None:
        """names: new name by the one in the file; it covers all of them, and none twice."""
        assert len(set(names.values())) == len(names) == len(tensors.entries)
        self.tensors, self.names = tensors, names
        self.entries = {names[stored]: entry for stored, entry in tensors.entries.items()}
        self.container = tensors.container

    def stream(self) -> Iterator[tuple[str, Read]]:
        for stored, read in self.tensors.stream():
            yield self.names[stored], read


class SafetensorsFiles(Tensors):
    """Tensors of one safetensors file, or of the shards that an index names.

    Raises:
        FileNotFoundError: If shards of the index are missing, with their names.
        ValueError: If a file is damaged, or index and shards name different tensors.
    """

    def __init__(self, path: Path) -> None:
        self.index = _read_index(path) if path.name.endswith(INDEX) else None
        self.paths = [path] if self.index is None else _shards(path, self.index)
        self.metadata: Mapping[str, str] = {}
        entries: dict[str, Stored] = {}
        homes: dict[str, str] = {}
        for file in self.paths:
            found, self.metadata = read_entries(file)
            entries |= found
            homes |= dict.fromkeys(found, file.name)
        if self.index is not None:
            _check_index(path, self.index, homes)
        self.entries = entries
        shards = len(self.paths)
        self.container = "a safetensors file" if self.index is None else f"{shards} safetensors shards"

    def stream(self) -> Iterator[tuple[str, Read]]:
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, partial(_read_safetensor, file, name)


def _read_safetensor(file: Any, name: str, span: Span | None) -> Tensor:
    if span is None:
        return file.get_tensor(name)
    if any(part.start >= part.stop for part in span):  # of no rows, which a slice cannot say
        return file.get_tensor(name)[span]
    return file.get_slice(name)[span]


def read_entries(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return shapes and dtypes by name, and the metadata, of a safetensors file; nothing else is read.

    Raises:
        ValueError: If the file is damaged or cut short, or holds a dtype that torch has no name for.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entries = {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                entries[name] = Stored(tuple(part.get_shape()), _dtype(path, name, part.get_dtype()))
            return entries, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); write or copy it again."
        ) from error


def _dtype(path: Path, name: str, code: str) -> torch.dtype:
    if code not in DTYPES:
        raise ValueError(
            f"{path}: {name} is stored as {code}, which cannot be read; known are {', '.join(DTYPES)}. "
            "Use the float weights that it was made from."
        )
    return DTYPES[code]


def _read_index(path: Path) -> dict[str, str]:
    """Return the file name of every tensor."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not an index of shards: it needs a weight_map of tensor to file name. Copy it again."
        ) from error
    return dict(weight_map)


def _shards(path: Path, index: Mapping[str, str]) -> list[Path]:
    names = sorted(set(index.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} names {len(names)} shards, of which {len(missing)} are not beside it: "
            f"{shortened(missing)}. Copy them there."
        )
    return [path.parent / name for name in names]


def _check_index(path: Path, index: Mapping[str, str], homes: Mapping[str, str]) -> None:
    differing = sorted(k for k in index.keys() | homes.keys() if index.get(k) != homes.get(k))
    if differing:
        raise ValueError(
            f"{path} and its shards disagree on where {len(differing)} tensors are: {shortened(differing)}. "
            "Copy index and shards from one place."
        )


def load_torch_dict(path: Path) -> Mapping[str, Any]:
    """Return the dict of a .pth or .pt file, its tensors mapped into memory where the format allows it.

    Raises:
        ValueError: If the file is damaged, holds more than tensors and plain values, or no dict.
    """
    try:
        # files older than torch 1.6 are no zip archives and cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects beside tensors, or is no torch file; loading such objects could run "
            "foreign code. Save its state dict alone: torch.save(net.state_dict(), path)."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a whole torch file ({first}); copy it again.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must be a dict of tensors.")
    return content


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the config.json of a folder, or None if there is none.

    Raises:
        ValueError: If it is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again.") from error


def shortened(names: Sequence[str], *, count: int = 5) -> str:
    """Join names; of a long list only the first ones."""
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")
