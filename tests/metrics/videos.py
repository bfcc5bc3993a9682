"""Small videos and clips for tests of metrics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from relic.ops.actions import integrate, parse_script
from relic.types import Clip

SIZE = (32, 48)


def noise(frames: int = 3, height: int = 40, width: int = 48, seed: int = 0) -> Tensor:
    """Random video with large and small structure, uint8 (f, h, w, 3)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, height // 8 + 1, width // 8 + 1, generator=generator)
    fine = torch.rand(frames, 3, height, width, generator=generator)
    video = 0.8 * F.interpolate(coarse, size=(height, width), mode="bilinear") + 0.2 * fine
    return (255 * video).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def intrinsics(size: tuple[int, int] = SIZE) -> Tensor:
    """A view of 90° across."""
    height, width = size
    focal = width / 2
    return torch.tensor([focal, focal, (width - 1) / 2, (height - 1) / 2], dtype=torch.float64)


def path(script: str) -> Tensor:
    return integrate(parse_script(script))


def clip(script: str, *, seed: int = 0) -> Clip:
    """A clip along a script in which equal poses show equal pictures and no others do."""
    c2w = path(script)
    keys = [tuple(pose.flatten().mul(1e4).round().int().tolist()) for pose in c2w]
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    pictures = noise(len(order), *SIZE, seed=seed)
    video = pictures[torch.tensor([order[key] for key in keys])]
    return Clip(video=video, c2w=c2w, intrinsics_px=intrinsics(), fps=16.0, d_bar=1.0)
