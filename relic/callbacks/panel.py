"""Pictures for people: truth beside sample beside the camera's path from above."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

__all__ = ["add_picture", "gif_bytes", "path_from_above", "side_by_side"]

PAPER, INK, TRAIL, CAMERA = (250, 248, 244), (60, 60, 60), (190, 190, 190), (200, 60, 40)


def path_from_above(c2w: Tensor, *, size: int) -> Tensor:
    """Draw the camera's path seen from above, growing frame by frame: uint8 (f, size, size, 3).

    c2w: (f, 4, 4). Up in the picture is where the first frame looks; a wedge shows where the camera looks
        now.
    """
    start = torch.linalg.inv(c2w[0].double())
    local = start @ c2w.double()
    ground, look = local[:, [0, 2], 3].numpy(), local[:, [0, 2], 2].numpy()
    centre = (ground.max(0) + ground.min(0)) / 2
    scale = 0.7 * size / max(float(np.ptp(ground, axis=0).max()), 1e-3)
    points = np.stack(
        [size / 2 + (ground[:, 0] - centre[0]) * scale, size / 2 - (ground[:, 1] - centre[1]) * scale], 1
    )
    frames = []
    for i, (x, y) in enumerate(points):
        picture = Image.new("RGB", (size, size), PAPER)
        draw = ImageDraw.Draw(picture)
        draw.line([tuple(p) for p in points], fill=TRAIL, width=1)
        draw.line([tuple(p) for p in points[: i + 1]], fill=INK, width=2)
        heading = np.degrees(np.arctan2(-look[i, 1], look[i, 0]))
        reach = size / 9
        draw.pieslice([x - reach, y - reach, x + reach, y + reach], heading - 35, heading + 35, fill=CAMERA)
        frames.append(np.asarray(picture))
    return torch.from_numpy(np.stack(frames))


def side_by_side(truth: Tensor, sample: Tensor, c2w: Tensor) -> Tensor:
    """Join truth, sample and path into one video. truth, sample: uint8 (f, h, w, 3) -> uint8 (f, h, 2w + h +
    4, 3).
    """
    frames, height = truth.shape[:2]
    gap = torch.full((frames, height, 2, 3), 255, dtype=torch.uint8)
    return torch.cat([truth, gap, sample, gap, path_from_above(c2w, size=height)], dim=2)


def gif_bytes(video: Tensor, *, fps: float) -> bytes:
    """Encode uint8 (f, h, w, 3) as an animated GIF, which TensorBoard shows in its image tab."""
    pictures = [
        Image.fromarray(frame.numpy()).convert("P", palette=Image.Palette.ADAPTIVE) for frame in video
    ]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
    )
    return buffer.getvalue()


def add_picture(writer: Any, tag: str, picture: bytes, *, step: int) -> None:
    """Add an encoded GIF, or PNG, to a TensorBoard SummaryWriter (whose own add_video wants moviepy)."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(encoded_image_string=picture)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
