"""Drift: how colour, saturation, exposure and sharpness of a video change from its first seconds to its last.

Colour is CIE L*a*b* (D65, from sRGB), where equal distances look about equally large.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from relic.metrics.similarity import check_same, check_video, luma, sharpness

__all__ = ["DriftScore", "Look", "drift_of", "look"]

CHUNK_PIXELS: Final = 2**20
XYZ_OF_RGB = (  # linear sRGB -> XYZ over the white point D65 (IEC 61966-2-1)
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)
KINK = 6 / 29  # below it the cube root of Lab is a line


class Look(NamedTuple):
    """How each frame of a video looks, (f,) float32 each.

    lightness: mean L*, 0 to 100. green_red: mean a*. blue_yellow: mean b*.
    saturation: mean chroma of its pixels, √(a*² + b*²): unlike that of the mean colour it does not cancel.
    exposure: mean BT.601 luma over 255, in [0, 1].
    sharpness: `relic.metrics.sharpness`, grey levels.
    """

    lightness: Tensor
    green_red: Tensor
    blue_yellow: Tensor
    saturation: Tensor
    exposure: Tensor
    sharpness: Tensor


def look(video: Tensor) -> Look:
    """Return the colour, saturation, exposure and sharpness of each frame. video: uint8 (f, h, w, 3)."""
    check_video(video)
    parts = []
    for part in video.split(max(1, CHUNK_PIXELS // (video.shape[1] * video.shape[2]))):
        lab = _lab(part)
        chroma = lab[..., 1:].square().sum(-1).sqrt().mean((1, 2))
        parts.append(torch.stack([*lab.mean((1, 2)).unbind(-1), chroma, luma(part).mean((1, 2)) / 255]))
    lightness, green_red, blue_yellow, saturation, exposure = torch.cat(parts, dim=1)
    return Look(lightness, green_red, blue_yellow, saturation, exposure, sharpness(video))


def drift_of(
    video: Tensor, *, fps: float, seconds: float = 1.0, truth: Tensor | None = None
) -> dict[str, float]:
    """Return the change of the mean look of the last seconds against that of the first ones.

    | name | unit |
    |---|---|
    | `drift/colour` | distance of the mean colours in L*a*b* (ΔE*ab), 0 or more |
    | `drift/lightness`, `drift/green_red`, `drift/blue_yellow` | L*, a*, b* |
    | `drift/saturation` | chroma |
    | `drift/exposure` | mean luma, of 1 |
    | `drift/sharpness` | log₂ of last over first: −1 is half as sharp; 0 if both are flat |

    What the camera sees changes all of these as well: with `truth`, the change of the true video stands
    beside each as `…_truth`. A flat end of a video that was not flat is −inf in sharpness.

    Args:
        video: uint8 (f, h, w, 3).
        fps: Frames a second.
        seconds: Length of either end.
        truth: uint8 (f, h, w, 3), the video it should equal.

    Raises:
        ValueError: If the two ends overlap, or lengths differ.
    """
    check_video(video)
    if not fps > 0:
        raise ValueError(f"fps={fps} must be positive.")
    frames = round(seconds * fps)
    if frames < 1 or 2 * frames > len(video):
        raise ValueError(
            f"seconds={seconds:g} at {fps:g} frames a second are {frames} frames at either end of a video of "
            f"{len(video)}; they must be at least one and not overlap: use {len(video) / 2 / fps:g} or less."
        )
    found = _change(video, frames)
    if truth is not None:
        check_same(video, truth)
        found |= {f"{name}_truth": value for name, value in _change(truth, frames).items()}
    return found


class DriftScore(Metric):
    """Accumulate the mean size of drift over clips and processes: |change|, so that signs do not cancel.

    `compute` returns the names of `drift_of`. Changes that are not finite (an end without any detail) are
    counted as `drift/not_finite` and left out of the means.

    Args:
        seconds: Length of either end of a clip.
    """

    is_differentiable = False
    full_state_update = False
    totals: Tensor
    counts: Tensor
    clips: Tensor
    not_finite: Tensor

    def __init__(self, *, seconds: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds = seconds
        for name in ("totals", "counts"):
            self.add_state(name, torch.zeros(2 * len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("clips", "not_finite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, video: Tensor, *, fps: float, truth: Tensor | None = None) -> None:
        """Add a clip; as `drift_of`."""
        changes = drift_of(video, fps=fps, seconds=self.seconds, truth=truth)
        values = torch.tensor(list(changes.values()), dtype=torch.float64).abs().to(self.totals.device)
        finite = values.isfinite()
        self.totals[: len(values)] += values.where(finite, 0.0)
        self.counts[: len(values)] += finite
        self.clips += 1
        self.not_finite += (~finite).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the means so far, by name; those of the truth if it was given."""
        names = [*NAMES, *(f"{name}_truth" for name in NAMES)]
        means = zip(names, self.totals / self.counts, self.counts, strict=True)
        found = {name: mean for index, (name, mean, n) in enumerate(means) if index < len(NAMES) or n}
        return found | {"drift/clips": self.clips, "drift/not_finite": self.not_finite}


NAMES: Final = ("drift/colour", *(f"drift/{name}" for name in Look._fields))


def _change(video: Tensor, frames: int) -> dict[str, float]:
    """Return the change from the first frames to the last, in the order of `NAMES`."""
    first, last = (
        torch.stack([row.double().mean() for row in look(end)]) for end in (video[:frames], video[-frames:])
    )
    change = last - first
    sharp = Look._fields.index("sharpness")
    flat = not (first[sharp] or last[sharp])
    change[sharp] = 0.0 if flat else torch.log2(last[sharp] / first[sharp])
    return dict(zip(NAMES, [float(change[:3].norm()), *change.tolist()], strict=True))


def _lab(video: Tensor) -> Tensor:
    """Convert uint8 sRGB (..., 3) to CIE L*a*b* (..., 3) float32, D65."""
    level = torch.arange(256, dtype=torch.float64) / 255
    linear = torch.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    linear = linear.float().to(video.device)
    xyz = linear[video.long()] @ linear.new_tensor(XYZ_OF_RGB).T
    root = torch.where(xyz > KINK**3, xyz.clamp(min=KINK**3) ** (1 / 3), xyz / (3 * KINK**2) + 4 / 29)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)
