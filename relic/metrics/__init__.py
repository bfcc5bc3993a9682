"""What is measured of generated video: functions and torchmetrics. Importing it loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relic.metrics.similarity import (
        LPIPS,
        FrameMean,
        LPIPSUnavailable,
        load_lpips,
        psnr,
        sharpness,
        sharpness_ratio,
        ssim,
    )

__all__ = [
    "LPIPS",
    "FrameMean",
    "LPIPSUnavailable",
    "load_lpips",
    "psnr",
    "sharpness",
    "sharpness_ratio",
    "ssim",
]

# names are looked up when used, so that importing this package loads nothing
_HOMES = {
    "similarity": (
        "LPIPS", "FrameMean", "LPIPSUnavailable", "load_lpips", "psnr", "sharpness", "sharpness_ratio",
        "ssim",
    ),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
