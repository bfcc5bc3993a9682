"""What the index says of a sample: its description and motion, or the reason it cannot be used."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from torch import Tensor

from relic.data.schema import (
    ACTIONS,
    C2W,
    CLIP_SCHEMA,
    JSON,
    LATENTS,
    LATENTS_SCHEMA,
    TRAJECTORY,
    VIDEO,
    load_array,
    load_json,
)
from relic.data.shards import Member
from relic.data.storage import RangeFile
from relic.data.video import count_frames
from relic.ops.actions import CHANNELS, encode_actions, integrate
from relic.ops.camera import check_rigid, turn_deg
from relic.types import latents_of

__all__ = ["AWAY_S", "describe_sample", "revisits"]

NEAR_STEPS: Final = 8.0  # d̄: half a second of walking at 16 frames a second
NEAR_TURN_DEG: Final = 20.0
AWAY_S: Final = 2.0
LOOKS_A_SECOND: Final = 4  # poses compared, so that minutes of video stay a small matrix

BLANK: Final[dict[str, Any]] = {
    "scene": "", "valid": False, "reason": "", "num_frames": 0, "fps": 0.0, "height": 0, "width": 0,
    "d_bar": 1.0, "translates": False, "captions": [], "action_sums": [], "speed": 0.0, "turn_deg": 0.0,
    "revisit_share": 0.0, "revisit_gap_s": 0.0, "source": "", "start": 0, "pivot": None, "vae_sha256": "",
    "levels": [],
}  # fmt: skip


def describe_sample(file: BinaryIO, members: Sequence[Member]) -> dict[str, Any]:
    """Return the index columns of a sample that are not its place; what is wrong with it is the `reason`.

    file: the opened shard; members: those of one sample.
    """
    places = {member.name: member for member in members}
    row = BLANK | {"kind": "latents" if LATENTS in places or TRAJECTORY in places else "clip"}
    try:
        row |= _latents(file, places) if row["kind"] == "latents" else _clip(file, places)
    except (ValueError, TypeError, AttributeError) as error:  # the latter two: a field of another type
        return row | {"reason": str(error)}
    return row | {"valid": True}


def _clip(file: BinaryIO, places: dict[str, Member]) -> dict[str, Any]:
    _need(places, VIDEO, C2W, JSON)
    key = places[JSON].key
    description = load_json(_read(file, places[JSON]), schema=CLIP_SCHEMA, key=key)
    c2w = torch.from_numpy(load_array(_read(file, places[C2W]), key=f"{key}.{C2W}"))
    if c2w.ndim != 3:
        raise ValueError(f"{key}.{C2W} has shape {tuple(c2w.shape)}; poses are (f, 4, 4).")
    check_rigid(c2w)
    video = places[VIDEO]
    frames = count_frames(RangeFile(_reader(file, video), video.length))
    if not frames == len(c2w) == description["num_frames"]:
        raise ValueError(
            f"{frames} video frames, {len(c2w)} poses, num_frames={description['num_frames']}: "
            "all must agree."
        )
    row = _common(description)
    row |= {
        "translates": bool(description["translates"]),
        "captions": list(map(str, description["captions"])),
    }
    row["scene"] = str(description["provenance"].get("scene", ""))
    if not row["scene"]:
        raise ValueError(f"{key}.json names no scene in its provenance; recordings are held out by scene.")
    actions = encode_actions(c2w, d_bar=row["d_bar"])
    return row | _motion(actions, c2w, fps=row["fps"], d_bar=row["d_bar"])


def _latents(file: BinaryIO, places: dict[str, Member]) -> dict[str, Any]:
    _need(places, ACTIONS, JSON)
    key = places[JSON].key
    description = load_json(_read(file, places[JSON]), schema=LATENTS_SCHEMA, key=key)
    actions = torch.from_numpy(load_array(_read(file, places[ACTIONS]), key=f"{key}.{ACTIONS}")).double()
    frames = description["num_frames"]
    if actions.shape != (frames, len(CHANNELS)):
        raise ValueError(
            f"{key}.{ACTIONS} has shape {tuple(actions.shape)}; must be ({frames}, {len(CHANNELS)})."
        )
    if not bool(actions.isfinite().all()):
        raise ValueError(f"{key}.{ACTIONS} holds NaN or infinity.")
    if TRAJECTORY in places and "levels" not in description:
        raise ValueError(f"{key}.json lacks levels, the noise levels of the states in {key}.{TRAJECTORY}.")
    levels = [float(level) for level in description["levels"]] if TRAJECTORY in places else []
    for name, axis in ((LATENTS, 0), (TRAJECTORY, 1)):
        if name in places:
            shape = _array_shape(_read(file, places[name], limit=256), key=f"{key}.{name}")
            if len(shape) != 4 + axis or shape[axis] != latents_of(frames):
                raise ValueError(
                    f"{key}.{name} has shape {shape}; {frames} frames are {latents_of(frames)} latents."
                )
            if name == TRAJECTORY and len(levels) + 1 != shape[0]:
                raise ValueError(
                    f"{key}.{name} holds {shape[0]} states; the {len(levels)} levels of {key}.json and the "
                    f"clean end make {len(levels) + 1}."
                )
    row = _common(description)
    row |= {"levels": levels}
    row |= {name: str(description[name]) for name in ("scene", "source", "vae_sha256")}
    pivot = description["pivot"]
    row |= {"start": int(description["start"]), "pivot": None if pivot is None else int(pivot)}
    row |= {"captions": [str(description["caption"])], "translates": bool(actions[:, :6].any())}
    return row | _motion(actions, integrate(actions), fps=row["fps"], d_bar=1.0)


def _common(description: dict[str, Any]) -> dict[str, Any]:
    """Take the numbers that both kinds of sample have, and check that they can be divided by."""
    row: dict[str, Any] = {name: int(description[name]) for name in ("num_frames", "height", "width")}
    row |= {name: float(description[name]) for name in ("fps", "d_bar")}
    for name, value in row.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be positive and finite.")
    return row


def _motion(actions: Tensor, c2w: Tensor, *, fps: float, d_bar: float) -> dict[str, Any]:
    """Measure actions (f, 13) and poses (f, 4, 4), in whose unit a mean step is `d_bar`."""
    a_second = max(1, round(fps))
    seconds = actions.split(a_second)
    c2w = c2w.double()
    steps = (c2w[1:, :3, 3] - c2w[:-1, :3, 3]).norm(dim=-1) / d_bar
    turns = turn_deg(c2w[:-1, :3, :3].mT @ c2w[1:, :3, :3])
    gaps = revisits(c2w, fps=fps, d_bar=d_bar)
    return {
        "action_sums": torch.stack([part.sum(0) for part in seconds]).flatten().float().tolist(),
        "speed": float(steps.mean()) if len(steps) else 0.0,
        "turn_deg": float(turns.mean()) if len(turns) else 0.0,
        "revisit_share": float((gaps > 0).double().mean()),
        "revisit_gap_s": float(gaps.max()),
    }


def revisits(c2w: Tensor, *, fps: float, d_bar: float) -> Tensor:
    """Return for a few looks a second how long the view had been away when it came back, 0 if it did not.

    A view is near another within 8 d̄ and 20 degrees; it comes back if it was near an earlier pose and
    then, for at least 2 s, near none. c2w: (f, 4, 4) -> (looks,) seconds.
    """
    stride = max(1, round(fps / LOOKS_A_SECOND))
    looks = c2w[::stride].double()
    distance = torch.cdist(looks[:, :3, 3], looks[:, :3, 3], compute_mode="donot_use_mm_for_euclid_dist")
    # trace(A Bᵀ) of every pair gives the turn between two views without the (n, n, 3, 3) products
    flat = looks[:, :3, :3].flatten(1)
    cosine = ((flat @ flat.mT) - 1) / 2
    near = (distance <= NEAR_STEPS * d_bar) & (cosine >= float(np.cos(np.deg2rad(NEAR_TURN_DEG))))
    # for look i, the last near look before j, running along j <= i; a jump in it is an absence
    count = len(looks)
    order = torch.arange(count).expand(count, count)
    last = torch.where(near, order, -1).cummax(1).values
    before = torch.cat([torch.full((count, 1), -1), last[:, :-1]], dim=1)
    gap = torch.where(near & (before >= 0) & (order <= order.mT), order - before, 0)
    seconds = gap.amax(1).double() * stride / fps
    return torch.where(seconds >= AWAY_S, seconds, 0.0)


def _need(places: dict[str, Member], *names: str) -> None:
    missing = [name for name in names if name not in places]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; it has {', '.join(sorted(places))}.")


def _read(file: BinaryIO, member: Member, *, limit: int | None = None) -> bytes:
    file.seek(member.offset)
    return file.read(member.length if limit is None else min(limit, member.length))


def _reader(file: BinaryIO, member: Member) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        file.seek(member.offset + offset)
        return file.read(length)

    return read


def _array_shape(head: bytes, *, key: str) -> tuple[int, ...]:
    """Read the shape from the first bytes of a .npy file."""
    try:
        stream = io.BytesIO(head)
        np.lib.format.read_magic(stream)
        return np.lib.format.read_array_header_1_0(stream)[0]
    except ValueError as error:
        raise ValueError(f"{key} is not a readable .npy array: {error}") from error
