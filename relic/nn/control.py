"""Camera control: actions are added to the tokens after self-attention, poses to Q and K before it (paper
§4.1).

Both encoders group frames as the VAE does (1 + 4 + 4 + ...) and pass an MLP of small width; each block reads
them through linear layers that start at zero, so that a freshly wrapped network computes what it did without
control.

Past the paper, `ControlConfig.rays` gives every token the viewing ray through it besides the pose of its
latent: what looks the same way then has like queries and keys, and no network need find that out by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from relic.ops.actions import CHANNELS
from relic.ops.camera import ray_features
from relic.types import TIME_STRIDE, Controls

__all__ = [
    "BlockControl",
    "ControlConfig",
    "ControlEncoders",
    "ControlStates",
    "group_frames",
    "is_control",
]

POSE_FEATURES = 9
RAY_FREQUENCIES = (2.0, 4.0, 8.0)
RAY_FEATURES = 8 + 6 * len(RAY_FREQUENCIES)


def is_control(name: str) -> bool:
    """Return whether a parameter of that name belongs to the camera control."""
    return "control" in name.split(".")


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Sizes of the camera control.

    Args:
        width: Hidden width of both encoders, and of what every block reads.
        poses: Whether blocks add the pose embedding to Q and K (off only for ablations).
        rays: Half the width and half the height of the picture, in focal lengths (1 is a 90° view): the pose
            embedding is then one for each token, of the ray through it at its latent's last frame. Null for
            the paper's, one for all tokens of a latent (in a YAML file, not on the command line).
    """

    width: int = 256
    poses: bool = True
    rays: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.rays is None:
            return
        if not self.poses:
            raise ValueError(f"rays={self.rays} are part of the pose embedding; set poses=True, or no rays.")
        if len(self.rays) != 2 or min(self.rays) <= 0:
            raise ValueError(
                f"rays={self.rays} must be two positive numbers: half the width and half the height of the "
                "picture, in focal lengths."
            )
        object.__setattr__(self, "rays", tuple(self.rays))  # JSON has no tuples


def group_frames(x: Tensor, *, starts_clip: bool) -> Tensor:
    """Group frames (b, f, c) into latent frames (b, t, 4·c); the first frame of a clip stands alone,
    repeated.

    Raises:
        ValueError: If the frames don't fill whole groups.
    """
    frames = x.shape[1]
    if starts_clip:
        x = torch.cat([repeat(x[:, :1], "b 1 c -> b p c", p=TIME_STRIDE - 1), x], dim=1)
    if x.shape[1] % TIME_STRIDE:
        rule = "4k+1 at the start of a clip" if starts_clip else "a multiple of 4 after it"
        raise ValueError(f"{frames} frames of control don't match the latent frames; there must be {rule}.")
    return rearrange(x, "b (t p) c -> b t (p c)", p=TIME_STRIDE)


@dataclass(frozen=True)
class ControlStates:
    """What blocks read: encoded actions (b, t, width) and, unless dropped, poses (b, t, 1 or s, width)."""

    action: Tensor
    pose: Tensor | None

    def to(self, dtype: torch.dtype) -> ControlStates:
        """Return them in another dtype."""
        return ControlStates(self.action.to(dtype), None if self.pose is None else self.pose.to(dtype))


def encoder(features: int, width: int) -> nn.Sequential:
    """Return an MLP: (..., features) -> (..., width)."""
    return nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())


class ControlEncoders(nn.Module):
    """Both encoders: Controls of pixel frames -> ControlStates of latent frames."""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        self.rays = config.rays
        self.action = encoder(TIME_STRIDE * len(CHANNELS), config.width)
        features = TIME_STRIDE * POSE_FEATURES + (RAY_FEATURES if config.rays else 0)
        self.pose = encoder(features, config.width) if config.poses else None

    def forward(self, controls: Controls, *, starts_clip: bool, grid: tuple[int, int]) -> ControlStates:
        """grid: rows and columns of the tokens of a latent."""
        dtype = next(self.action.parameters()).dtype
        action = self.action(group_frames(controls.actions.to(dtype), starts_clip=starts_clip))
        if self.pose is None or controls.poses is None:
            return ControlStates(action, None)
        poses = group_frames(controls.poses, starts_clip=starts_clip)[:, :, None]
        if self.rays is not None:
            rows, columns = grid
            last = poses[:, :, 0, -POSE_FEATURES:]
            rays = ray_features(
                last, rows=rows, columns=columns, reach=self.rays, frequencies=RAY_FREQUENCIES
            )
            poses = torch.cat([poses.expand(-1, -1, rows * columns, -1), rays], dim=-1)
        return ControlStates(action, self.pose(poses.to(dtype)))


class BlockControl(nn.Module):
    """What one block adds: `action` to the tokens, `pose_q` and `pose_k` to Q and K. All start at zero."""

    def __init__(self, config: ControlConfig, *, width: int) -> None:
        super().__init__()
        self.action = nn.Linear(config.width, width)
        self.pose_q = nn.Linear(config.width, width) if config.poses else None
        self.pose_k = nn.Linear(config.width, width) if config.poses else None

    def address(self, states: ControlStates) -> tuple[Tensor | None, Tensor | None]:
        """Return what poses add to Q and K, (b, t, 1 or s, d) each, or None if they are dropped."""
        if states.pose is None or self.pose_q is None or self.pose_k is None:
            return None, None
        return self.pose_q(states.pose), self.pose_k(states.pose)

    def reset_parameters(self) -> None:
        """Set every output to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
