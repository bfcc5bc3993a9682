"""Matrices in 8 bits, to ship: each row as whole numbers of its own unit, half the bytes of bfloat16.

A row's unit is its largest magnitude / 127, stored beside the matrix in float32. Networks never compute with
these: they are read as the floats that they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from relic.nn.tensor_files import Read, Span, Stored, Tensors, part

__all__ = ["FromEightBits", "InEightBits", "rounded"]

UNIT = ".unit"  # added to a matrix's name
LARGEST = 127
LEAST = 4096  # numbers in a matrix; of smaller ones nothing is saved


def rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix (n, ...) in units of its rows, int8, and these units (n, 1, ...), float32."""
    unit = matrix.float().flatten(1).abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    unit = unit.reshape(-1, *(1,) * (matrix.ndim - 1))
    return (matrix.float() / unit).round().clamp(-LARGEST, LARGEST).to(torch.int8), unit


class InEightBits(Tensors):
    """Tensors whose matrices are rounded, for a file."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors, self.container = tensors, tensors.container
        self.entries = {}
        for name, entry in tensors.entries.items():
            if _is_matrix(entry):
                units = (entry.shape[0], *(1,) * (len(entry.shape) - 1))
                self.entries[name] = Stored(entry.shape, torch.int8)
                self.entries[name + UNIT] = Stored(units, torch.float32)
            else:
                self.entries[name] = entry

    def stream(self) -> Iterator[tuple[str, Read]]:
        for name, read in self.tensors.stream():
            if name + UNIT in self.entries:
                for label, tensor in zip((name, name + UNIT), rounded(read(None)), strict=True):
                    yield label, partial(part, tensor)
            else:
                yield name, read


class FromEightBits(Tensors):
    """Tensors of a file, in which rounded matrices are the floats that they stand for."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors, self.container = tensors, tensors.container
        stored = tensors.entries
        self.coded = {n for n, e in stored.items() if e.dtype == torch.int8 and n + UNIT in stored}
        units = {name + UNIT for name in self.coded}
        self.entries = {
            name: Stored(entry.shape, torch.float32) if name in self.coded else entry
            for name, entry in stored.items()
            if name not in units
        }

    def stream(self) -> Iterator[tuple[str, Read]]:
        halves: dict[str, Read] = {}  # of a matrix whose other part is still to come, from the same file
        for name, read in self.tensors.stream():
            matrix = name.removesuffix(UNIT)
            if matrix not in self.coded:
                yield name, read
            elif matrix in halves:
                other = halves.pop(matrix)
                values, unit = (read, other) if name == matrix else (other, read)
                yield matrix, partial(_restored, values, unit)
            else:
                halves[matrix] = read


def _is_matrix(entry: Stored) -> bool:
    return entry.dtype.is_floating_point and len(entry.shape) > 1 and entry.numel >= LEAST


def _restored(values: Read, unit: Read, span: Span | None) -> Tensor:
    return values(span).float() * unit(None if span is None else span[:1])
