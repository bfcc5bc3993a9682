"""Pictures from disk, for worlds to start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["fitted", "open_image"]


def open_image(path: Path) -> Image.Image:
    """Open a picture as RGB.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no picture.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No image at {path}; give --image a picture to start from.")
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:  # of another kind, or cut short
        raise ValueError(f"{path} is not a picture that can be read; give a PNG or JPEG.") from error


def fitted(picture: Image.Image, *, height: int, width: int) -> np.ndarray:
    """Crop the middle of a picture to the proportions of height and width and scale it: (h, w, 3) uint8."""
    if picture.size == (width, height):
        return np.array(picture)
    scale = min(picture.width / width, picture.height / height)
    crop = max(1, round(scale * width)), max(1, round(scale * height))
    left, top = (picture.width - crop[0]) // 2, (picture.height - crop[1]) // 2
    print(
        f"image      {picture.height}x{picture.width}: its middle {crop[1]}x{crop[0]} is scaled to "
        f"{height}x{width}"
    )
    cut = picture.crop((left, top, left + crop[0], top + crop[1]))
    return np.array(cut.resize((width, height), Image.Resampling.LANCZOS))
