"""Camera control: actions are added to the tokens after self-attention, poses to Q and K before it (paper
§4.1).

Both encoders group frames as the VAE does (1 + 4 + 4 + ...) and pass an MLP of small width; each block reads
them through linear layers that start at zero, so that a freshly wrapped network computes what it did without
control.

Past the paper, `ControlConfig.rays` turns queries, keys and values of every token by where its viewing ray
leads, as RoPE does by its place: attention then knows how far apart two tokens look, whatever the camera did
in between, and what it reads is told relative to where the reader looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from relic.nn.context import Rays
from relic.ops.actions import CHANNELS
from relic.ops.camera import shell_points
from relic.ops.pooling import pool_cells
from relic.ops.rope import ray_table
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
        rays: Half the width of the picture in focal lengths (the tangent of half its angle of view; 1 is
            90°), to turn queries, keys and values by viewing rays; pixels are square. 0 for the paper's
            network. It changes what a network computes, so it is for those that are fitted from the start.
        inverse_depths: Depths at which rays are told apart, 1/d̄, one for each head in turn; they divide the
            heads. Heads of 0 know directions alone.
    """

    width: int = 256
    poses: bool = True
    rays: float = 0.0
    inverse_depths: tuple[float, ...] = (0.04, 0.02, 0.01, 0.0)

    def __post_init__(self) -> None:
        if self.rays < 0:
            raise ValueError(
                f"rays={self.rays} must be positive, half the width of the picture in focal lengths, or 0."
            )
        if not self.inverse_depths or min(self.inverse_depths) < 0:
            raise ValueError(
                f"inverse_depths={self.inverse_depths} must be one or more numbers from 0 (infinitely far) "
                "up."
            )
        object.__setattr__(self, "inverse_depths", tuple(self.inverse_depths))


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
    """What blocks read: encoded actions (b, t, width); unless dropped, poses (b, t, width); and the tables of
    rays, (b, z, t·s, 2, d) for z shells, of the tokens and of cells, if the network has them.
    """

    action: Tensor
    pose: Tensor | None
    rays: Rays | None = None

    def to(self, dtype: torch.dtype) -> ControlStates:
        """Return them in another dtype, but for the tables."""
        return ControlStates(
            self.action.to(dtype), None if self.pose is None else self.pose.to(dtype), self.rays
        )


def encoder(features: int, width: int) -> nn.Sequential:
    """Return an MLP: (..., features) -> (..., width)."""
    return nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())


class ControlEncoders(nn.Module):
    """Both encoders: Controls of pixel frames -> ControlStates of latent frames.

    Raises:
        ValueError: If the heads can't share the depths of the rays, or are too narrow for rays.
    """

    def __init__(self, config: ControlConfig, *, heads: int, head_width: int) -> None:
        super().__init__()
        self.config, self.head_width = config, head_width
        self.action = encoder(TIME_STRIDE * len(CHANNELS), config.width)
        self.pose = encoder(TIME_STRIDE * POSE_FEATURES, config.width) if config.poses else None
        if config.rays:
            if heads % len(config.inverse_depths):
                raise ValueError(
                    f"inverse_depths={config.inverse_depths} don't divide heads={heads}; give as many as "
                    "there are heads, or a divisor."
                )
            ray_table(torch.zeros(1, 3), head_width=head_width)  # refuses heads without room

    def forward(
        self, controls: Controls, *, starts_clip: bool, grid: tuple[int, int], factors: Sequence[int] = ()
    ) -> ControlStates:
        """grid: rows and columns of the tokens of a latent; factors: of the cells whose rays are needed."""
        dtype = next(self.action.parameters()).dtype
        action = self.action(group_frames(controls.actions.to(dtype), starts_clip=starts_clip))
        if controls.poses is None:
            return ControlStates(action, None)
        poses = group_frames(controls.poses, starts_clip=starts_clip)
        pose = None if self.pose is None else self.pose(poses.to(dtype))
        return ControlStates(action, pose, self.rays(poses, grid=grid, factors=factors))

    def rays(self, poses: Tensor, *, grid: tuple[int, int], factors: Sequence[int]) -> Rays | None:
        """poses: (b, t, 4·9) -> tables (b, z, t·s, 2, d), float32 at least. A cell looks at the mean of the
        points that its tokens look at.
        """
        if not self.config.rays:
            return None
        points = shell_points(
            poses.to(torch.promote_types(poses.dtype, torch.float32)).unflatten(-1, (TIME_STRIDE, -1)),
            rows=grid[0], columns=grid[1], reach=self.config.rays, inverse_depths=self.config.inverse_depths,
        )  # fmt: skip
        squares = rearrange(points, "b t z (h w) a -> b z t h w a", h=grid[0])
        return {
            factor: ray_table(pool_cells(squares, factor=factor).flatten(2, 4), head_width=self.head_width)
            for factor in (1, *factors)
        }


class BlockControl(nn.Module):
    """What one block adds: `action` to the tokens, `pose_q` and `pose_k` to Q and K. All start at zero."""

    def __init__(self, config: ControlConfig, *, width: int) -> None:
        super().__init__()
        self.action = nn.Linear(config.width, width)
        self.pose_q = nn.Linear(config.width, width) if config.poses else None
        self.pose_k = nn.Linear(config.width, width) if config.poses else None

    def address(self, states: ControlStates) -> tuple[Tensor | None, Tensor | None]:
        """Return what poses add to Q and K, (b, t, 1, d) each, or None if they are dropped."""
        if states.pose is None or self.pose_q is None or self.pose_k is None:
            return None, None
        pose = states.pose[:, :, None]
        return self.pose_q(pose), self.pose_k(pose)

    def reset_parameters(self) -> None:
        """Set every output to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
