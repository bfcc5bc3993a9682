"""Small synthetic datasets: random smooth motion, blocks of noise for pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from relic.data.index import write_index
from relic.data.schema import ACTIONS, JSON, LATENTS, LATENTS_SCHEMA, TRAJECTORY, dump_array, dump_json
from relic.data.shards import pack_sample, write_shard
from relic.ops.actions import CHANNELS, integrate
from relic.types import latents_of

SIZE = 64
INTRINSICS = torch.tensor([50.0, 50.0, SIZE / 2 - 0.5, SIZE / 2 - 0.5], dtype=torch.float64)


def smooth_path(num_frames: int, *, seed: int) -> Tensor:
    """Return poses (f, 4, 4) of a random walk whose speeds change slowly, about 0.1 scene units a frame."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(num_frames // 16 + 2, 6, generator=generator, dtype=torch.float64)
    speeds = torch.nn.functional.interpolate(anchors.T[None], size=num_frames, mode="linear")[0].T
    actions = torch.zeros(num_frames, len(CHANNELS), dtype=torch.float64)
    actions[1:, 0], actions[1:, 1] = speeds[1:, 0].clamp(min=0), (-speeds[1:, 0]).clamp(min=0)
    actions[1:, 3], actions[1:, 2] = speeds[1:, 1].clamp(min=0), (-speeds[1:, 1]).clamp(min=0)
    actions[1:, 9], actions[1:, 8] = speeds[1:, 2].clamp(min=0), (-speeds[1:, 2]).clamp(min=0)
    return integrate(actions, d_bar=0.1)


def noise_frames(num_frames: int, *, seed: int, size: int = SIZE) -> Iterator[np.ndarray]:
    """Yield frames (h, w, 3) of coarse noise, the frame's number in the brightness of the first block."""
    generator = np.random.default_rng(seed)
    for number in range(num_frames):
        frame = generator.integers(0, 255, (size // 16, size // 16, 3), dtype=np.uint8)
        frame = frame.repeat(16, 0).repeat(16, 1)
        frame[:16, :16] = number % 200
        yield frame


def clip_sample(
    num_frames: int = 97, *, seed: int = 0, scene: str = "room", fps: float = 16.0, size: int = SIZE
) -> dict[str, bytes]:
    """Return the members of a recording."""
    return pack_sample(
        frames=noise_frames(num_frames, seed=seed, size=size),
        c2w=smooth_path(num_frames, seed=seed),
        intrinsics_px=INTRINSICS,
        fps=fps,
        captions=(f"a {scene} with stairs", f"a {scene} with a window"),
        provenance={"scene": scene, "seed": seed},
    )


def latents_sample(
    num_frames: int = 33,
    *,
    seed: int = 0,
    scene: str = "room",
    vae_sha256: str = "0" * 64,
    states: int = 0,
    levels: tuple[float, ...] | None = None,
    size: int = SIZE,
) -> dict[str, bytes]:
    """Return the members of an encoded window; with `states`, of a trajectory instead."""
    generator = np.random.default_rng(seed)
    shape = (latents_of(num_frames), 4, size // 8, size // 8)
    actions = np.zeros((num_frames, len(CHANNELS)), np.float32)
    actions[1:, seed % 6] = 1
    content = generator.normal(size=(states, *shape) if states else shape).astype(np.float16)
    description = {
        "schema": LATENTS_SCHEMA, "num_frames": num_frames, "fps": 16.0, "height": size, "width": size,
        "d_bar": 0.1, "caption": f"a {scene}", "scene": scene, "source": "walk", "start": 0, "pivot": None,
        "vae_sha256": vae_sha256,
    }  # fmt: skip
    if states:
        evenly = np.linspace(1, 0, states)[:-1].tolist()
        description |= {"levels": evenly if levels is None else list(levels)}
    member = TRAJECTORY if states else LATENTS
    return {member: dump_array(content), ACTIONS: dump_array(actions), JSON: dump_json(description)}


def write_dataset(
    root: Path, samples: Sequence[tuple[str, dict[str, bytes]]], *, per_shard: int = 2, index: bool = True
) -> Path:
    """Write samples to shards of a few and index them."""
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        write_shard(root / "shards" / f"{shard:05d}.tar", samples[start : start + per_shard])
    if index:
        write_index(root)
    return root
