"""Prompts: a small trained word table for small worlds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["WordTable", "WordTableConfig"]


@dataclass(frozen=True, kw_only=True)
class WordTableConfig:
    """A trained table of word embeddings.

    Args:
        rows: Rows; word ids are hashed into 1..rows−1 (`relic.ops.words`), 0 is padding.
        width: Width of an embedding, the DiT's `text_width`.
    """

    rows: int = 16384
    width: int = 64


class WordTable(nn.Module):
    """Look up word ids (b, n) -> (b, n, width). Rows start at zero, so an unseen word says no more than
    padding.
    """

    def __init__(self, config: WordTableConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.rows, config.width))

    def forward(self, ids: Tensor) -> Tensor:
        known = (ids != 0)[..., None]
        return nn.functional.embedding(ids, self.weight) * known
