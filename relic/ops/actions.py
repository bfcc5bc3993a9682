"""The 13-channel action codec: camera poses <-> actions (paper §3, Algorithm 1), one convention everywhere.

Label `a_0` is static; `a_t` is the motion from frame t−1 to frame t, in the camera axes of frame t−1:
Δp = R_{t−1}ᵀ(p_t − p_{t−1}) in units of d̄, and R_{t−1}ᵀR_t = R_y(pan_right)·R_x(tilt_up)·R_z(roll_cw), in
degrees per frame. Each signed component is split into two non-negative channels. `static` is an extra
indicator; the other channels keep their values beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from relic.ops.camera import (
    accumulate,
    angles_from_rotation,
    pose_features,
    relative,
    rigid,
    rotation_from_angles,
    turn_deg,
)
from relic.types import Controls

__all__ = [
    "CHANNELS",
    "KEYS",
    "STATIC",
    "controls_of",
    "decode_actions",
    "encode_actions",
    "exchange_actions",
    "from_keys",
    "integrate",
    "mean_step",
    "mirror_actions",
    "null_controls",
    "parse_script",
]

CHANNELS = (
    "dolly_in", "dolly_out", "truck_left", "truck_right", "pedestal_up", "pedestal_down",
    "tilt_up", "tilt_down", "pan_left", "pan_right", "roll_cw", "roll_ccw", "static",
)  # fmt: skip
STATIC = CHANNELS.index("static")

# (positive channel, negative channel) of each signed component
TRANSLATION_PAIRS = ((3, 2), (5, 4), (0, 1))  # x right, y down, z forward
ROTATION_PAIRS = ((9, 8), (6, 7), (10, 11))  # pan right, tilt up, roll clockwise

REST = 1e-9  # scene units per frame; a camera that moves less stands still
STATIC_STEP = 0.02  # of d̄
STATIC_TURN_DEG = 0.02
KEY_TURN_DEG = 2.0  # degrees per frame while a rotation key is held, at γ = 1

KEYS: Mapping[str, str] = {
    "w": "dolly_in", "s": "dolly_out", "a": "truck_left", "d": "truck_right",
    "e": "pedestal_up", "q": "pedestal_down",
    "i": "tilt_up", "k": "tilt_down", "j": "pan_left", "l": "pan_right", "o": "roll_cw", "u": "roll_ccw",
}  # fmt: skip


def mean_step(c2w: Tensor) -> tuple[float, bool]:
    """Return d̄, the mean length of the moving steps of a recording (f, 4, 4), and whether it moves at all.

    A step counts as moving when it is longer than a thousandth of the longest one (rest is exactly zero in an
    engine and noise in a tracker). A recording that never translates gets d̄ = 1 scene unit and False.
    """
    steps = (c2w[1:, :3, 3] - c2w[:-1, :3, 3]).double().norm(dim=-1)
    if len(steps) == 0 or steps.max() <= REST:
        return 1.0, False
    return float(steps[steps > max(1e-3 * float(steps.max()), REST)].mean()), True


def encode_actions(c2w: Tensor, *, d_bar: float | Tensor) -> Tensor:
    """Turn poses (..., f, 4, 4) into actions (..., f, 13), float64. d_bar: scene units, scalar or (...,)."""
    motion = relative(c2w.double())
    unit = torch.as_tensor(d_bar, dtype=torch.float64, device=c2w.device)[..., None, None]
    return _join(motion[..., :3, 3] / unit, motion[..., :3, :3])


def _join(step: Tensor, rotation: Tensor) -> Tensor:
    """Split signed steps (..., 3) in d̄ and rotations (..., 3, 3) into the 13 channels."""
    angles = angles_from_rotation(rotation)
    actions = step.new_zeros(*step.shape[:-1], len(CHANNELS))
    for signed, pairs in ((step, TRANSLATION_PAIRS), (angles, ROTATION_PAIRS)):
        for axis, (positive, negative) in enumerate(pairs):
            actions[..., positive] = signed[..., axis].clamp(min=0)
            actions[..., negative] = (-signed[..., axis]).clamp(min=0)
    still = (step.norm(dim=-1) < STATIC_STEP) & (turn_deg(rotation) < STATIC_TURN_DEG)
    actions[..., STATIC] = still.to(step.dtype)
    return actions


def decode_actions(actions: Tensor) -> Tensor:
    """Turn actions (..., f, 13) into the motion of each frame (..., f, 4, 4), float64, translation in d̄."""
    if actions.shape[-1] != len(CHANNELS):
        raise ValueError(
            f"actions have {actions.shape[-1]} channels; they must be the {len(CHANNELS)} of "
            f"{', '.join(CHANNELS)}."
        )
    actions = actions.double()
    step = torch.stack([actions[..., p] - actions[..., n] for p, n in TRANSLATION_PAIRS], dim=-1)
    angles = torch.stack([actions[..., p] - actions[..., n] for p, n in ROTATION_PAIRS], dim=-1)
    return rigid(rotation_from_angles(angles), step)


def integrate(actions: Tensor, *, d_bar: float = 1.0) -> Tensor:
    """Integrate actions (..., f, 13) from the identity into c2w (..., f, 4, 4), float64 (paper §3).

    C_t = C_{t−1}·[ΔC_t | Δp_t]. `d_bar` sets the unit of the positions: 1 leaves them in d̄.
    """
    motion = decode_actions(actions)
    return accumulate(rigid(motion[..., :3, :3], motion[..., :3, 3] * d_bar))


def controls_of(actions: Tensor) -> Controls:
    """Return what a network is given: the actions and the poses integrated from them. actions: (b, f, 13)."""
    return Controls(actions=actions, poses=pose_features(integrate(actions)).to(actions.device))


def null_controls(actions: Tensor) -> Controls:
    """Return the null action (13 zeros, no pose embedding) in the shape of `actions`. It is not `static`."""
    return Controls(actions=torch.zeros_like(actions), poses=None)


def from_keys(held: Iterable[str], *, gamma: float = 1.0) -> Tensor:
    """Return the action (13,) of held keys or channel names, scaled by the exploration speed γ (paper §3).

    Translation keys give 1.0 (d̄ per frame), rotation keys 2 degrees per frame. Opposite keys cancel.
    """
    action = torch.zeros(len(CHANNELS), dtype=torch.float64)
    for name in held:
        channel = KEYS.get(name, name)
        if channel not in CHANNELS:
            raise ValueError(
                f"{name!r} is neither a key ({''.join(KEYS)}) nor an action ({', '.join(CHANNELS)})."
            )
        index = CHANNELS.index(channel)
        if index != STATIC:
            action[index] = gamma * (KEY_TURN_DEG if index >= 6 else 1.0)
    for positive, negative in TRANSLATION_PAIRS + ROTATION_PAIRS:
        shared = torch.minimum(action[positive], action[negative])
        action[[positive, negative]] -= shared
    action[STATIC] = float(not action.any())
    return action


def parse_script(script: str, *, gamma: float = 1.0) -> Tensor:
    """Turn "dolly_in*16 pan_left+dolly_in*24 static*8" into actions (f, 13), float64, static frame first."""
    rows = [from_keys(["static"])]
    for word in script.split():
        names, _, count = word.partition("*")
        if count and not count.isdecimal():
            raise ValueError(f"{word!r}: write an action as name*frames, e.g. dolly_in*16.")
        rows += [from_keys(names.split("+"), gamma=gamma)] * int(count or 1)
    return torch.stack(rows)


def mirror_actions(actions: Tensor) -> Tensor:
    """Swap the two channels of every axis: the opposite of each motion."""
    order = list(range(len(CHANNELS)))
    for positive, negative in TRANSLATION_PAIRS + ROTATION_PAIRS:
        order[positive], order[negative] = negative, positive
    return actions[..., order]


def exchange_actions(actions: Tensor) -> Tensor:
    """Swap actions (b, f, 13) between clips of similar mean speed, so that only the motion is wrong.

    Clips are ranked by mean speed (d̄ a frame plus degrees a frame over two) and neighbours swap. Of an odd
    number the fastest clip keeps its own.
    """
    speed = actions[..., :6].sum(-1).mean(1) + actions[..., 6:12].sum(-1).mean(1) / 2
    order = speed.argsort()
    order = order[: len(order) // 2 * 2]
    swapped = actions.clone()
    swapped[order[0::2]], swapped[order[1::2]] = actions[order[1::2]], actions[order[0::2]]
    return swapped
