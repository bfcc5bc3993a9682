"""Captions as word ids by hashing: text for small worlds, with no vocabulary to keep in step."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

__all__ = ["word_ids"]


def word_ids(caption: str, *, length: int = 32, table: int = 16384) -> Tensor:
    """Hash the first `length` lower-cased words of a caption to 1..table-1 -> (length,) int64, padded with 0.

    Raises:
        ValueError: If `length` or `table` leaves no room.
    """
    if length < 1 or table < 2:
        raise ValueError(f"length={length} must be at least 1 and table={table} at least 2 (0 is padding).")
    words = re.findall(r"\w+", caption.lower())[:length]
    ids = torch.zeros(length, dtype=torch.int64)
    for place, word in enumerate(words):
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        ids[place] = 1 + int.from_bytes(digest, "little") % (table - 1)
    return ids
