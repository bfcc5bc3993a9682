"""Rigid camera geometry. OpenCV axes everywhere: x right, y down, z forward; `c2w` takes camera to world.

All functions compute in float64: an action stream of minutes is integrated step by step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

__all__ = [
    "accumulate",
    "angles_from_rotation",
    "check_rigid",
    "invert_rigid",
    "opengl_to_opencv",
    "orthonormalise",
    "pose_features",
    "project",
    "relative",
    "rigid",
    "rotation_from_angles",
    "shell_points",
    "turn_deg",
    "umeyama",
    "unreal_to_opencv",
]

REORTHONORMALISE_EVERY = 256  # frames
POSITION_UNIT = 8.0  # pose features hold positions in eighths of a d_bar


def rigid(rotation: Tensor, position: Tensor) -> Tensor:
    """Assemble (..., 4, 4) from rotation (..., 3, 3) and position (..., 3)."""
    top = torch.cat([rotation, position[..., None]], dim=-1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], dim=-2)


def invert_rigid(matrix: Tensor) -> Tensor:
    """Invert rigid (..., 4, 4) matrices: c2w <-> w2c."""
    rotation_t = matrix[..., :3, :3].mT
    return rigid(rotation_t, -(rotation_t @ matrix[..., :3, 3:])[..., 0])


def check_rigid(c2w: Tensor, *, name: str = "c2w", tolerance: float = 1e-4) -> None:
    """Raise ValueError unless every (..., 4, 4) matrix is a finite proper rotation with a position."""
    if c2w.shape[-2:] != (4, 4):
        raise ValueError(
            f"{name} has shape {tuple(c2w.shape)}; it must be (..., 4, 4) camera-to-world matrices."
        )
    flat = c2w.double().reshape(-1, 4, 4)
    finite = flat.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise ValueError(f"{name}[{bad}] holds NaN or infinity; drop the frame or repair the recording.")
    rotation = flat[:, :3, :3]
    error = (rotation.mT @ rotation - torch.eye(3).to(rotation)).abs().amax((1, 2))
    if (error > tolerance).any():
        bad = int(error.argmax())
        raise ValueError(
            f"{name}[{bad}] is not rigid: |RᵀR − I| = {error[bad]:.2g} > {tolerance:g}; "
            "remove scale and shear from the rotation."
        )
    det = torch.linalg.det(rotation)
    if (det < 0).any():
        bad = int(det.argmin())
        raise ValueError(
            f"{name}[{bad}] is a reflection: det R = {det[bad]:.3f}, must be +1; the source has "
            "left-handed axes, convert them first (relic.ops.camera.unreal_to_opencv, opengl_to_opencv)."
        )
    last = flat.new_tensor([0.0, 0.0, 0.0, 1.0])
    if ((flat[:, 3] - last).abs() > tolerance).any():
        raise ValueError(f"{name}: the last row must be 0 0 0 1; the matrices may be transposed.")


def rotation_from_angles(angles_deg: Tensor) -> Tensor:
    """Build R_y(pan_right)·R_x(tilt_up)·R_z(roll_cw), intrinsic.

    angles_deg: (..., 3) pan, tilt, roll -> (..., 3, 3).
    """
    (sp, st, sr), (cp, ct, cr) = (
        torch.deg2rad(angles_deg).sin().unbind(-1),
        torch.deg2rad(angles_deg).cos().unbind(-1),
    )
    rows = [
        cp * cr + sp * st * sr, sp * st * cr - cp * sr, sp * ct,
        ct * sr, ct * cr, -st,
        cp * st * sr - sp * cr, sp * sr + cp * st * cr, cp * ct,
    ]  # fmt: skip
    return rearrange(torch.stack(rows, dim=-1), "... (i j) -> ... i j", i=3)


def angles_from_rotation(rotation: Tensor) -> Tensor:
    """Invert `rotation_from_angles`: (..., 3, 3) -> (..., 3) degrees, tilt in [-90, 90].

    Exact for any rotation: near ±90° of tilt, where pan and roll merge, pan is read after the roll is undone,
    so that what one loses to rounding the other holds.
    """
    cos_tilt = torch.hypot(rotation[..., 1, 0], rotation[..., 1, 1])
    tilt = torch.atan2(-rotation[..., 1, 2], cos_tilt)
    level = cos_tilt > 1e-14  # else it looks straight up or down, and all roll is called pan
    roll = torch.where(level, torch.atan2(rotation[..., 1, 0], rotation[..., 1, 1]), torch.zeros_like(tilt))
    sin, cos = roll.sin(), roll.cos()
    unrolled_x = rotation[..., 0, 0] * cos - rotation[..., 0, 1] * sin
    unrolled_z = rotation[..., 2, 0] * cos - rotation[..., 2, 1] * sin
    return torch.rad2deg(torch.stack([torch.atan2(-unrolled_z, unrolled_x), tilt, roll], dim=-1))


def turn_deg(rotation: Tensor) -> Tensor:
    """Return the angle of rotations (..., 3, 3) in degrees, accurate for tiny turns too."""
    skew = torch.stack(
        [
            rotation[..., 2, 1] - rotation[..., 1, 2],
            rotation[..., 0, 2] - rotation[..., 2, 0],
            rotation[..., 1, 0] - rotation[..., 0, 1],
        ],
        dim=-1,
    )
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.atan2(skew.norm(dim=-1), trace - 1))


def orthonormalise(matrix: Tensor) -> Tensor:
    """Return the rigid matrices nearest to (..., 4, 4), rotation by SVD."""
    u, _, vh = torch.linalg.svd(matrix[..., :3, :3])
    sign = torch.linalg.det(u @ vh).sign()
    u = torch.cat([u[..., :2], u[..., 2:] * sign[..., None, None]], dim=-1)
    return rigid(u @ vh, matrix[..., :3, 3])


def relative(c2w: Tensor) -> Tensor:
    """Return the motion from frame t−1 to t in the camera axes of t−1: C_{t−1}⁻¹ C_t, identity first.

    c2w: (..., f, 4, 4) -> (..., f, 4, 4).
    """
    motion = invert_rigid(c2w[..., :-1, :, :]) @ c2w[..., 1:, :, :]
    first = torch.eye(4, dtype=c2w.dtype, device=c2w.device).expand_as(c2w[..., :1, :, :])
    return torch.cat([first, motion], dim=-3)


def accumulate(motion: Tensor) -> Tensor:
    """Chain motions into poses: C_t = C_{t−1} · motion_t. (..., f, 4, 4) -> (..., f, 4, 4).

    Runs as a parallel prefix product inside stretches of 256 frames; rotations are re-orthonormalised between
    them.
    """
    frames = motion.shape[-3]
    carry = torch.eye(4, dtype=motion.dtype, device=motion.device)
    poses = []
    for start in range(0, frames, REORTHONORMALISE_EVERY):
        stretch = motion[..., start : start + REORTHONORMALISE_EVERY, :, :]
        step = 1
        while step < stretch.shape[-3]:
            head, tail = stretch[..., :step, :, :], stretch[..., :-step, :, :] @ stretch[..., step:, :, :]
            stretch = torch.cat([head, tail], dim=-3)
            step *= 2
        stretch = carry @ stretch
        poses.append(stretch)
        if start + REORTHONORMALISE_EVERY < frames:
            carry = orthonormalise(stretch[..., -1:, :, :])
    return torch.cat(poses, dim=-3)


def pose_features(c2w: Tensor, *, d_bar: float | Tensor = 1.0) -> Tensor:
    """Describe poses to a network: position in units of 8 d̄ and the first two columns of R.

    c2w: (..., f, 4, 4) with the clip's first frame as origin; d_bar: scalar or (...,) -> (..., f, 9) float32.
    """
    unit = POSITION_UNIT * torch.as_tensor(d_bar, dtype=c2w.dtype, device=c2w.device)[..., None, None]
    position = c2w[..., :3, 3] / unit
    columns = rearrange(c2w[..., :3, :2], "... i j -> ... (j i)")
    return torch.cat([position, columns], dim=-1).float()


def shell_points(
    poses: Tensor, *, rows: int, columns: int, reach: float, inverse_depths: Sequence[float]
) -> Tensor:
    """Return where the viewing rays through the middles of a picture's cells meet shells of given depths.

    A point is told in units of its shell's depth: direction + inverse depth · position, in the clip's axes.
    Inverse depth 0 leaves the direction alone, a shell at infinity. Of several frames it is the mean.

    poses: (..., p, 9) of p frames from `pose_features`; reach: half the width of the picture in focal lengths
    (1 is a 90° view), cells being square; inverse_depths: of each shell, 1/d̄ -> (..., z, rows · columns, 3),
    row after row.
    """
    position, right, down = poses.unflatten(-1, (3, 3)).unbind(-2)
    rotation = torch.stack([right, down, torch.linalg.cross(right, down)], dim=-1).mean(-3)
    position = POSITION_UNIT * position.mean(-2)
    x, y = (
        (torch.arange(count, dtype=poses.dtype, device=poses.device) + 0.5) * (2 / count) - 1
        for count in (columns, rows)
    )
    x, y = reach * x.repeat(rows), reach * (rows / columns) * y.repeat_interleave(columns)
    ahead = F.normalize(torch.stack([x, y, torch.ones_like(x)], dim=-1), dim=-1)
    # not a matrix product, which autocast would round
    ray = (rotation[..., None, :, :] * ahead[:, None, :]).sum(-1)
    return torch.stack([ray + nearness * position[..., None, :] for nearness in inverse_depths], dim=-3)


def project(points: Tensor, w2c: Tensor, *, intrinsics_px: Tensor) -> tuple[Tensor, Tensor]:
    """Project world points (..., n, 3) through w2c (..., 4, 4) -> pixels (..., n, 2) and depth (..., n)."""
    camera = points @ w2c[..., :3, :3].mT + w2c[..., None, :3, 3]
    depth = camera[..., 2]
    fx, fy, cx, cy = intrinsics_px.unbind(-1)
    pixels = torch.stack([fx * camera[..., 0] / depth + cx, fy * camera[..., 1] / depth + cy], dim=-1)
    return pixels, depth


def opengl_to_opencv(c2w_gl: Tensor) -> Tensor:
    """Convert c2w with OpenGL camera axes (x right, y up, z backward) to OpenCV axes; the world stays."""
    return c2w_gl * c2w_gl.new_tensor([1.0, -1.0, -1.0, 1.0])


def unreal_to_opencv(position_cm: Tensor, *, pitch_deg: Tensor, yaw_deg: Tensor, roll_deg: Tensor) -> Tensor:
    """Convert Unreal poses (centimetres, FRotator degrees) to c2w in metres.

    Unreal's axes are left-handed: X forward, Y right, Z up. The world becomes x = UE Y, y = −UE Z, z = UE X,
    right-handed. Positive yaw turns right, positive pitch looks up, positive roll tilts the camera clockwise.
    position_cm: (..., 3).
    """
    x, y, z = (position_cm.double() / 100).unbind(-1)
    angles = torch.stack([yaw_deg, pitch_deg, roll_deg], dim=-1).double()
    return rigid(rotation_from_angles(angles), torch.stack([y, -z, x], dim=-1))


def umeyama(source: Tensor, target: Tensor, *, with_scale: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Find scale, R, t minimising Σ|target − (scale·R·source + t)|² (Umeyama 1991). source, target: (n, 3).

    Raises:
        ValueError: If shapes differ or `source` does not move (the similarity is undefined).
    """
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 3:
        raise ValueError(
            f"umeyama needs two (n, 3) paths, got {tuple(source.shape)} and {tuple(target.shape)}."
        )
    source, target = source.double(), target.double()
    mean_s, mean_t = source.mean(0), target.mean(0)
    centred_s, centred_t = source - mean_s, target - mean_t
    variance = centred_s.square().sum(1).mean()
    if variance < 1e-18:
        raise ValueError("umeyama: the source path does not move, so scale and rotation are undefined.")
    u, d, vh = torch.linalg.svd(centred_t.mT @ centred_s / len(source))
    sign = torch.ones_like(d)
    if torch.linalg.det(u) * torch.linalg.det(vh) < 0:
        sign[2] = -1
    rotation = u @ torch.diag(sign) @ vh
    scale = (d * sign).sum() / variance if with_scale else torch.ones_like(variance)
    return scale, rotation, mean_t - scale * rotation @ mean_s
