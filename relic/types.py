"""The values that cross borders between packages.

Legend used in every shape comment of this library: `b` batch, `t` latent frames, `f` pixel frames, `c h w`
channels and size, `n` tokens, `l` layers, `k` heads, `d` head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Batch", "Block", "Clip", "ClipSpec", "Controls", "Mixed", "latents_of"]

TIME_STRIDE = 4  # pixel frames per latent frame after the first (1 + 4 + 4 + ...)
SPACE_STRIDE = 8  # pixels per latent cell, each side
PATCH = 2  # latent cells per token, each side


def latents_of(num_frames: int) -> int:
    """Return the number of latent frames of a clip of `num_frames` pixel frames (1 + 4 + 4 + ...).

    Raises:
        ValueError: If `num_frames` is not 4k+1.
    """
    if num_frames < 1 or num_frames % TIME_STRIDE != 1:
        lower = max(1, (num_frames - 1) // TIME_STRIDE * TIME_STRIDE + 1)
        raise ValueError(
            f"num_frames={num_frames} must be 4k+1 (the VAE is causal: one frame, then groups of four); "
            f"use {lower} or {lower + TIME_STRIDE}."
        )
    return 1 + (num_frames - 1) // TIME_STRIDE


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """The shape of what is generated: one truth for data, networks and sampling.

    Args:
        height: Pixel rows; a multiple of 16 (8x VAE, then 2x2 patches).
        width: Pixel columns; a multiple of 16.
        fps: Frames a second.
        horizons: Clip lengths in pixel frames, each 4k+1 and the image latent plus whole blocks
            (81, 161, 321 are 5, 10 and 20 s at 16 frames a second).
        block_latents: Latent frames generated at a time (4 is one second at 16 frames a second; 2 for low
            latency).
    """

    height: int = 480
    width: int = 832
    fps: int = 16
    horizons: tuple[int, ...] = (81,)
    block_latents: int = 4

    def __post_init__(self) -> None:
        grid = SPACE_STRIDE * PATCH
        for name in ("height", "width"):
            size = getattr(self, name)
            if size < grid or size % grid:
                near = max(grid, round(size / grid) * grid)
                raise ValueError(
                    f"{name}={size} must be a multiple of {grid} (8x VAE, then 2x2 patches); use {near}."
                )
        if self.fps <= 0:
            raise ValueError(f"fps={self.fps} must be positive.")
        if self.block_latents < 1:
            raise ValueError(
                f"block_latents={self.block_latents} must be at least 1; use 4, or 2 for low latency."
            )
        if not self.horizons:
            raise ValueError("horizons=() must name at least one clip length in frames, e.g. (81,).")
        for frames in self.horizons:
            blocks, rest = divmod(latents_of(frames) - 1, self.block_latents)
            if rest:
                near = 1 + TIME_STRIDE * self.block_latents * max(1, blocks)
                raise ValueError(
                    f"horizons: {frames} frames are the image latent and {latents_of(frames) - 1} more, "
                    f"which block_latents={self.block_latents} does not divide; use {near} frames."
                )

    @property
    def max_frames(self) -> int:
        """The longest horizon in pixel frames."""
        return max(self.horizons)

    @property
    def latent_height(self) -> int:
        return self.height // SPACE_STRIDE

    @property
    def latent_width(self) -> int:
        return self.width // SPACE_STRIDE


class Clip(NamedTuple):
    """One recording, or a part of one. Importers, the engine and metrics speak Clip.

    video: (f, h, w, 3) uint8, RGB.
    c2w: (f, 4, 4) float64, camera to world, OpenCV axes (x right, y down, z forward).
    intrinsics_px: (4,) float64, `fx fy cx cy` in pixels, pixel centres at integers (cx = w/2 - 0.5).
    fps: frames a second.
    d_bar: the mean moving step of the *source recording* in scene units per frame at `fps`.
    captions: one caption per 5-s segment, static content only.
    provenance: where it came from: scene, seed, engine version, and for parts the window.
    """

    video: Tensor
    c2w: Tensor
    intrinsics_px: Tensor
    fps: float
    d_bar: float
    captions: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = {}


class Batch(NamedTuple):
    """What a data module yields and every stage consumes. Exactly one of the first three is not None.

    latents: (b, t, c, h, w) normalised VAE latents.
    trajectory: (b, s, t, c, h, w) states of an ODE solution, the last one clean.
    video: (b, f, 3, h, w) uint8.
    actions: (b, f, 13) float32, see `relic.ops.actions`.
    text: (b, n, d) float prompt embeddings, or (b, n) int64 word ids.
    d_bar: (b,) float64, scene units per unit of translation.
    key: (b,) int64, fresh for every draw: all noise of a sample is derived from it.
    """

    latents: Tensor | None
    trajectory: Tensor | None
    video: Tensor | None
    actions: Tensor
    text: Tensor
    d_bar: Tensor
    key: Tensor


class Mixed(NamedTuple):
    """A training batch of two parts: clips with actions, and plain video whose actions no one may read."""

    steered: Batch
    plain: Batch


class Controls(NamedTuple):
    """What steers the camera. `poses=None` drops the pose embedding (the null action has it dropped).

    actions: (b, f, 13); poses: (b, f, 9) from `relic.ops.camera.pose_features`, or None.
    """

    actions: Tensor
    poses: Tensor | None


class Block(NamedTuple):
    """One step of a rollout. latents: (b, t, c, h, w) clean; controls of the same frames; index from 0."""

    latents: Tensor
    controls: Controls
    index: int  # type: ignore[assignment]  # shadows tuple.index, which no one needs here
