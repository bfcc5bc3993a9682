"""How long from a key to a picture that knows of it? Streaming on this machine, by the length of a block.

A student with random weights, or a world, is played as `relic.Session` plays it, decoder included, for
`--frames` frames, in which its memory fills. Blocks are generated so that each is ready when the one before
it ends; a key waits for the next block to be begun. With T seconds a block and g to generate it, that takes
g, and up to T more, evenly.

    python benchmarks/latency.py --blocks 2 4 --threads 2
    python benchmarks/latency.py --world tiny
"""

from __future__ import annotations

import argparse
import time

import torch
from machine import describe_machine

from relic.nn.control import ControlConfig
from relic.nn.dit import DiTConfig
from relic.nn.student import FewSteps, StudentConfig
from relic.nn.text import WordTableConfig
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig
from relic.ops.retention import Compressed
from relic.types import TIME_STRIDE, ClipSpec
from relic.world import World


def world_of(args: argparse.Namespace, *, block_latents: int, dtype: torch.dtype) -> World:
    """Return a world of random weights."""
    heads = args.width // 64
    depths = tuple(0.04 / 2**i for i in range(heads))
    net = DiTConfig(
        width=args.width, depth=args.depth, heads=heads, ffn=4 * args.width, text_width=64,
        text_length=32, rope_factor=81 / 21,
        control=ControlConfig(width=64, rays=0.77, inverse_depths=depths),
    )  # fmt: skip
    clip = ClipSpec(
        height=args.size[0], width=args.size[1], horizons=(args.frames,), block_latents=block_latents
    )
    config = StudentConfig(
        net=net, words=WordTableConfig(width=64), clip=clip, policy=Compressed(window=8),
        sampler=FewSteps(steps=args.steps, shift=1.0),
    )  # fmt: skip
    torch.manual_seed(0)
    vae = TinyVAE(TinyVAEConfig()).eval().requires_grad_(False)
    student = config.build().eval().requires_grad_(False).to(dtype)
    return World(net=student, vae=vae, config=config, d_bar=0.05, name="random")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256])
    parser.add_argument("--frames", type=int, default=321)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4], help="latents of a block")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--world", help="a bundle, whose own sizes and steps count, not those given here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe_machine())
    print(f"{args.threads} threads")
    for block_latents in [None] if args.world else args.blocks:
        for name in args.dtypes:
            dtype = getattr(torch, name)
            if block_latents is None:
                world = World.load(args.world, dtype=dtype)
            else:
                world = world_of(args, block_latents=block_latents, dtype=dtype)
            clip, sampler = world.config.clip, world.config.sampler
            image = torch.randint(0, 256, (clip.height, clip.width, 3), dtype=torch.uint8)
            session = world.start(image, "a room", seed=0)
            frames, times = TIME_STRIDE * clip.block_latents, []
            actions = torch.zeros(frames, 13)
            actions[:, 0] = 1.0
            length = args.frames if world.endless else min(args.frames, clip.max_frames)
            for _ in range((length - 1) // frames):
                start = time.perf_counter()
                session.step(actions)
                times.append(time.perf_counter() - start)
            taken = torch.tensor(times[1:])
            waits = torch.linspace(0, 1, 101)[:, None] * frames / clip.fps + taken
            what = f"{clip.height}x{clip.width}, {sampler.steps} steps, blocks of {clip.block_latents}"
            print(
                f"{what}, {name:<8} {frames / taken.mean():5.1f} frames/s, at the end "
                f"{frames / taken[-4:].mean():5.1f}; a block {taken.median():.2f} s, key to picture "
                f"{waits.median():.2f} s, 95th percentile {waits.quantile(0.95):.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
