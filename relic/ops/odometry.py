"""Poses of an action stream, a stretch at a time: what `relic.ops.actions.integrate` gives for the whole.

The chain of a stretch is computed again from where rotations were last made orthonormal, by the same prefix
product as in batch: on one device the poses are equal to the last bit, however the stream is cut.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from relic.ops.actions import decode_actions
from relic.ops.camera import REORTHONORMALISE_EVERY, accumulate, orthonormalise

__all__ = ["Odometry", "advance"]


class Odometry(NamedTuple):
    """Where a stream stands. carry: (b, 4, 4) pose before the stretch; motion: (b, f, 4, 4) of the stretch.

    Both are float64 on the host; f stays below 256.
    """

    carry: Tensor
    motion: Tensor

    @classmethod
    def origin(cls, batch: int) -> Odometry:
        """Return the start of a stream: identity, nothing walked."""
        eye = torch.eye(4, dtype=torch.float64).repeat(batch, 1, 1)
        return cls(carry=eye, motion=eye.new_empty(batch, 0, 4, 4))


def advance(odometry: Odometry, actions: Tensor) -> tuple[Odometry, Tensor]:
    """Walk on by actions (b, f, 13): return where the stream stands then, and c2w (b, f, 4, 4) float64, in
    d̄.
    """
    motion = torch.cat([odometry.motion, decode_actions(actions.cpu())], dim=1)
    walked, carry, poses = odometry.motion.shape[1], odometry.carry, []
    while motion.shape[1] >= REORTHONORMALISE_EVERY:
        stretch, motion = motion[:, :REORTHONORMALISE_EVERY], motion[:, REORTHONORMALISE_EVERY:]
        poses.append(carry[:, None] @ accumulate(stretch))
        carry = orthonormalise(poses[-1][:, -1])
    poses.append(carry[:, None] @ accumulate(motion) if motion.shape[1] else motion)
    return Odometry(carry=carry, motion=motion), torch.cat(poses, dim=1)[:, walked:]
