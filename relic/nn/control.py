"""Camera control: actions are added to the tokens after self-attention, poses to Q and K before it (paper
§4.1).

Both encoders group frames as the VAE does (1 + 4 + 4 + ...) and pass an MLP of small width; each block reads
them through linear layers that start at zero, so that a freshly wrapped network computes what it did without
control.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from relic.ops.actions import CHANNELS
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


def is_control(name: str) -> bool:
    """Return whether a parameter of that name belongs to the camera control."""
    return "control" in name.split(".")


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Sizes of the camera control.

    Args:
        width: Hidden width of both encoders, and of what every block reads.
        poses: Whether blocks add the pose embedding to Q and K (off only for ablations).
    """

    width: int = 256
    poses: bool = True


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
    """What blocks read: encoded actions and, unless dropped, poses, each (b, t, width)."""

    action: Tensor
    pose: Tensor | None

    def to(self, dtype: torch.dtype) -> ControlStates:
        """Return them in another dtype."""
        return ControlStates(self.action.to(dtype), None if self.pose is None else self.pose.to(dtype))


def encoder(channels: int, width: int) -> nn.Sequential:
    """Return an MLP over grouped frames: (b, t, 4·channels) -> (b, t, width)."""
    return nn.Sequential(
        nn.Linear(TIME_STRIDE * channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
    )


class ControlEncoders(nn.Module):
    """Both encoders: Controls of pixel frames -> ControlStates of latent frames."""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        self.action = encoder(len(CHANNELS), config.width)
        self.pose = encoder(POSE_FEATURES, config.width) if config.poses else None

    def forward(self, controls: Controls, *, starts_clip: bool) -> ControlStates:
        dtype = next(self.action.parameters()).dtype
        action = self.action(group_frames(controls.actions.to(dtype), starts_clip=starts_clip))
        if self.pose is None or controls.poses is None:
            return ControlStates(action, None)
        return ControlStates(
            action, self.pose(group_frames(controls.poses.to(dtype), starts_clip=starts_clip))
        )


class BlockControl(nn.Module):
    """What one block adds: `action` to the tokens, `pose_q` and `pose_k` to Q and K. All start at zero."""

    def __init__(self, config: ControlConfig, *, width: int) -> None:
        super().__init__()
        self.action = nn.Linear(config.width, width)
        self.pose_q = nn.Linear(config.width, width) if config.poses else None
        self.pose_k = nn.Linear(config.width, width) if config.poses else None

    def address(self, states: ControlStates) -> tuple[Tensor | None, Tensor | None]:
        """Return what poses add to Q and K, (b, t, d) each, or None if they are dropped."""
        if states.pose is None or self.pose_q is None or self.pose_k is None:
            return None, None
        return self.pose_q(states.pose), self.pose_k(states.pose)

    def reset_parameters(self) -> None:
        """Set every output to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
