"""Captions as word ids by hashing: text for small worlds, with no vocabulary to keep in step."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

__all__ = ["WORD_ROWS", "word_ids"]

WORD_ROWS = 16384  # of every word table: one hash for all data sets and networks


def word_ids(caption: str, *, length: int = 32) -> Tensor:
    """Hash the first `length` lower-cased words of a caption to 1..WORD_ROWS-1 -> (length,) int64.

    0 is padding.

    Raises:
        ValueError: If `length` is not positive.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1.")
    words = re.findall(r"\w+", caption.lower())[:length]
    ids = torch.zeros(length, dtype=torch.int64)
    for place, word in enumerate(words):
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        ids[place] = 1 + int.from_bytes(digest, "little") % (WORD_ROWS - 1)
    return ids
