"""Write safetensors tensor by tensor: the host never holds more than one of them.

A file is written whole or not at all, and has the bytes that safetensors itself would have written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from relic.nn.tensor_files import DTYPES, INDEX, Stored

__all__ = ["SafetensorsWriter", "open_writer", "write_shards"]

CODES = {dtype: code for code, dtype in DTYPES.items()}
# wide dtypes first, so that all are aligned; among equals the order of the safetensors library
ORDER = ["I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"]


class SafetensorsWriter:
    """Lay out one file from what it will hold; then take the tensors in any order.

    Raises:
        ValueError: If safetensors has no name for a dtype.
    """

    def __init__(self, path: Path, entries: Mapping[str, Stored], *, metadata: Mapping[str, str]) -> None:
        for name, entry in entries.items():
            if entry.dtype not in CODES:
                known = ", ".join(str(dtype) for dtype in CODES)
                raise ValueError(f"{name} has dtype {entry.dtype}, safetensors can hold {known}; cast it.")
        self.entries = entries
        self.left = set(entries)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self.offsets: dict[str, int] = {}
        end = 0
        for name in sorted(entries, key=lambda name: (ORDER.index(CODES[entries[name].dtype]), name)):
            entry = entries[name]
            self.offsets[name] = end
            header[name] = {
                "dtype": CODES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [end, end + entry.nbytes],
            }
            end += entry.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self.file = path.open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.file.truncate(self.start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, cast to the dtype it was announced with."""
        entry = self.entries[name]
        assert tuple(tensor.shape) == entry.shape, f"{name}: {tuple(tensor.shape)} is not {entry.shape}"
        values = tensor.detach().to("cpu", entry.dtype).contiguous().reshape(-1)
        self.file.seek(self.start + self.offsets[name])
        self.file.write(values.view(torch.uint8).numpy().data)
        self.left.discard(name)


@contextmanager
def open_writer(
    path: Path, entries: Mapping[str, Stored], *, metadata: Mapping[str, str]
) -> Iterator[SafetensorsWriter]:
    """Open a writer whose file takes its name once every tensor is in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        writer = SafetensorsWriter(partial, entries, metadata=metadata)
        with writer.file:
            yield writer
        assert not writer.left, f"{len(writer.left)} tensors of {path} were never written"
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_shards(
    folder: Path,
    entries: Mapping[str, Stored],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    stem: str = "diffusion_pytorch_model",
    shard_bytes: int,
) -> list[Path]:
    """Write tensors into `folder` as one file, or as shards with an index if they exceed `shard_bytes`.

    entries: what there will be, in the order in which `tensors` brings it.
    """
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    count = len(shards)
    names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    supply = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        with open_writer(folder / name, shard, metadata={"format": "pt"}) as writer:
            for _ in shard:
                writer.write(*next(supply))
    if count > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries.values())},
            "weight_map": {
                key: name for name, shard in zip(names, shards, strict=True) for key in sorted(shard)
            },
        }
        (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [folder / name for name in names]
