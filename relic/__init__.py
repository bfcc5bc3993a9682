"""RELIC: interactive video world models that remember. Importing this package loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relic.world import World

__all__ = ["World", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "World":  # looked up when used, since it loads torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("relic.world").World
