"""Prompts: a small trained word table for small worlds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relic.ops.words import WORD_ROWS

__all__ = ["WordTable", "WordTableConfig"]


@dataclass(frozen=True, kw_only=True)
class WordTableConfig:
    """A trained table of word embeddings, with a row for every hash of `relic.ops.words`.

    Args:
        width: Width of an embedding, the DiT's `text_width`.
    """

    width: int = 64


class WordTable(nn.Module):
    """Look up word ids (b, n) -> (b, n, width). Rows start at zero, so an unseen word says no more than
    padding.
    """

    def __init__(self, config: WordTableConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(WORD_ROWS, config.width))

    def reset_parameters(self) -> None:
        """Set every row to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        known = (ids != 0)[..., None]
        return nn.functional.embedding(ids, self.weight) * known
