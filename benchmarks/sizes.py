"""The network that figures of small trials were measured with."""

from __future__ import annotations

from typing import Any

from relic.nn.dit import DiTConfig

__all__ = ["small"]


def small(**changes: Any) -> DiTConfig:
    """4.2 M parameters, word table aside: fitted on a CPU in minutes."""
    return DiTConfig.tiny(**{"width": 192, "depth": 6, "heads": 3, "ffn": 768, **changes})
