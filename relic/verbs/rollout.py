"""`relic rollout`: an image, a prompt and a script of actions -> a video, and a picture of the memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from relic.callbacks.memory_picture import Glance, draw_memory
from relic.callbacks.panel import path_from_above
from relic.data.picture import fitted, open_image
from relic.data.video import encode_video
from relic.nn.memory import Memory
from relic.nn.shares import attention_shares
from relic.ops.actions import from_keys, integrate, parse_script
from relic.ops.retention import factors_seen, window_start
from relic.session import Session
from relic.world import World

__all__ = ["rollout"]


def rollout(
    bundle: str,
    *,
    actions: str,
    image: str | None = None,
    prompt: str | None = None,
    gamma: float = 1.0,
    out: str = "out.mp4",
    panel: bool = False,
    memory: str | None = None,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Roll a world out from an image along a script of actions, and write the video.

    Args:
        bundle: Folder of the world, from relic export, or the name of a shipped one: tiny.
        actions: Script, e.g. "dolly_in*16 pan_left+dolly_in*24 static*8": what is held, for how many frames.
        image: Picture to start from, cropped and scaled to the world's size; by default the world's own.
        prompt: What is there; by default that of the world's own picture.
        gamma: Exploration speed: 1 is the mean step of the training set, or 2 degrees, a frame.
        out: The video (mp4).
        panel: Draw the camera's path from above beside the video.
        memory: Also draw what each block remembers, and where its attention goes, to this picture. Each block
            then passes through the network once more.
        seed: Seed of the noise.
        device: Where to compute; auto takes a GPU if there is one, and bf16 there.
    """
    if not (gamma > 0 and np.isfinite(gamma)):
        raise ValueError(f"gamma={gamma} must be positive; 1 is the speed of the training set.")
    steer = parse_script(actions, gamma=gamma)  # a wrong word fails before anything is loaded
    if len(steer) < 2:
        raise ValueError("actions are empty; write e.g. --actions 'dolly_in*16 pan_left*24'.")
    if Path(out).suffix != ".mp4":
        raise ValueError(f"out={out} must end in .mp4.")
    picture = None if image is None else open_image(Path(image))
    place = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    world = World.load(bundle, device=place, dtype=torch.float32 if place == "cpu" else torch.bfloat16)
    clip = world.config.clip
    steer = padded(steer, frames=4 * clip.block_latents)
    check_length(world, frames=len(steer))
    first = None
    if picture is not None:
        first = torch.from_numpy(fitted(picture, height=clip.height, width=clip.width))
    session = world.start(first, prompt, seed=seed, undo_seconds=0)
    glances: list[Glance] = []
    frames = played(session, steer[1:], glances=None if memory is None else glances)
    if panel:
        frames = beside_path(frames, integrate(steer), height=clip.height)
    video, (count, height, width) = encode_video(frames, fps=clip.fps)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_bytes(video)
    print(f"wrote      {out}: {count} frames of {height}x{width}, {count / clip.fps:.1f} s")
    if memory is not None:
        draw_memory(glances, Path(memory), title=f"{Path(bundle).name}: {world.config.policy}")
        print(f"picture    {memory}")


def padded(steer: Tensor, *, frames: int) -> Tensor:
    """Fill actions (1 + f, 13) up with static ones to whole blocks of `frames`."""
    lacking = -(len(steer) - 1) % frames
    if not lacking:
        return steer
    print(f"actions    {len(steer) - 1} frames, and {lacking} static ones to fill the last block of {frames}")
    return torch.cat([steer, from_keys(["static"]).expand(lacking, -1)])


def check_length(world: World, *, frames: int) -> None:
    """Raise ValueError if a script is longer than the world's horizon."""
    horizon = world.config.clip.max_frames
    if not world.endless and frames > horizon:
        raise ValueError(
            f"the script is {frames} frames long with its image, the horizon of this world {horizon}: "
            "shorten it, or make the world endless: relic export --max_latents N bounds a compressed memory."
        )


def played(session: Session, steer: Tensor, *, glances: list[Glance] | None) -> Iterator[np.ndarray]:
    """Play actions (f, 13) and yield frames (h, w, 3), the image's first; note what blocks see, if asked."""
    yield session.shown.numpy()
    for stretch in tqdm(steer.split(session.frames), desc="rollout", unit=" blocks"):
        before = None if glances is None else session.rollout.memory.fork()
        frames = session.step(stretch)
        if before is not None and glances is not None:
            glances.append(glance(session, before))
        yield from frames.numpy()


def glance(session: Session, before: Memory) -> Glance:
    """Return what the last block saw, given the memory as it was before that block was committed."""
    block, sampler = session.block, session.rollout.sampler
    assert block is not None
    shares = attention_shares(
        session.rollout.net,
        before,
        block._replace(latents=session.rollout.context),
        sigma=sampler.context_level,
        text=session.text,
    )
    plan = before.plan
    policy, size = plan.policy, plan.block_latents
    kept = before.kept() if policy.repositions else None
    return Glance(
        block=block.index,
        factors=factors_seen(policy, block.index, block_latents=size, kept=kept),
        first_of_window=window_start(policy, block.index, block_latents=size),
        first_own=plan.block(block.index).start,
        window=float(shares.window.mean()),
        memory=float(shares.memory.mean()),
        own=float(shares.own.mean()),
    )


def beside_path(frames: Iterator[np.ndarray], c2w: Tensor, *, height: int) -> Iterator[np.ndarray]:
    """Put the camera's path from above beside each frame. c2w: (f, 4, 4)."""
    gap = np.full((height, 2, 3), 255, np.uint8)
    for frame, path in zip(frames, path_from_above(c2w, size=height), strict=True):
        yield np.concatenate([frame, gap, path.numpy()], axis=1)
