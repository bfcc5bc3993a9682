"""OpenCV, imported where it is used."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

__all__ = ["core"]


@lru_cache(maxsize=1)
def core() -> Any:
    """Return the module cv2.

    Raises:
        ImportError: If OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "visual odometry needs OpenCV, which is not installed: pip install 'relic-world[metrics]'."
        ) from error
    return cv2
