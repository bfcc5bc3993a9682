"""What a memory costs: keys, cache bytes, and time of attention and commit, by policy and length.

One layer is timed with random keys and values, in a stream that has come to the given length; bytes are those
of all layers of the network.
Usage: python benchmarks/memory.py --net wan_14b --size 480 832 --latents 21 41 81
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable

import torch
from machine import describe_machine

from relic.nn.context import FreshKV
from relic.nn.dit import DiTConfig
from relic.nn.memory import Compressed, Full, Memory, MemoryPlan, Policy, SinkWindow, Window
from relic.ops.camera import rotation_from_angles
from relic.ops.pooling import cell_positions
from relic.ops.rope import rope_table
from relic.types import TIME_STRIDE, ClipSpec

TURN = 11.0  # degrees a latent
NETS = {"tiny": DiTConfig.tiny, "wan_1b": DiTConfig.wan_1b, "wan_14b": DiTConfig.wan_14b}


def policies(window: int, bound: int) -> dict[str, Policy]:
    """The policies that are compared; the bounded one is given its horizon, so that it re-maps places."""
    return {
        "full": Full(),
        f"window {window}": Window(latents=window),
        f"sink 1, window {window}": SinkWindow(sink=1, window=window),
        f"compressed, window {window}": Compressed(window=window),
        f"compressed, at most {bound}": Compressed(window=window, max_latents=bound),
    }


def seconds(call: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def fresh(plan: MemoryPlan, block: int, *, dtype: torch.dtype, device: torch.device) -> tuple[FreshKV, ...]:
    """Random keys and values of a block, of one layer."""
    shape = (1, plan.heads, len(plan.block(block)) * plan.tokens_per_latent, plan.head_width)
    return (FreshKV(*(torch.randn(shape, device=device).to(dtype) for _ in "kv")),)


@torch.no_grad()
def measure(
    plan: MemoryPlan, *, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[float, float]:
    """Return seconds of one layer's attention in the last block of the plan, and of its commit."""
    one = dataclasses.replace(plan, layers=1)
    memory = Memory(one, dtype=dtype, device=device)
    last = plan.blocks_in(plan.num_latents or 0) - 1
    angles = torch.zeros(1, plan.blocks_in(plan.num_latents or 0) * one.block_latents, 3, dtype=torch.float64)
    angles[0, :, 0] = TURN * torch.arange(angles.shape[1])  # ever new views, so that memories choose
    c2w = torch.eye(4, dtype=torch.float64).repeat(1, angles.shape[1], 1, 1)
    c2w[..., :3, :3] = rotation_from_angles(angles)
    while memory.block < last:
        given = fresh(one, memory.block, dtype=dtype, device=device)
        block = one.block(memory.block)
        memory.commit(given, c2w=c2w[:, block.start : block.stop])
    view, (current,) = memory.view(), fresh(one, last, dtype=dtype, device=device)
    rope = rope_table(cell_positions(view.times, one.rows, one.columns), head_width=one.head_width)
    rope = rope.to(device, torch.float32)
    layer, times = view.layer(0), slice(one.block(last).start, one.block(last).stop)
    attention = seconds(lambda: layer(current.k, current.k, current.v, rope=rope), device, repeats=repeats)
    start = memory.fork()
    forks = iter([start.fork() for _ in range(3)])
    commit = seconds(lambda: next(forks).commit((current,), c2w=c2w[:, times]), device, repeats=2)
    return attention, commit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS), default="tiny")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256])
    parser.add_argument("--latents", type=int, nargs="+", default=[21, 41, 81])
    parser.add_argument("--block_latents", type=int, default=4)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--bound", type=int, default=29, help="max_latents of the bounded policy")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(describe_machine())
    print(f"{args.net} at {args.size[0]}x{args.size[1]}, blocks of {args.block_latents}, {dtype}, batch 1")
    print(f"{'policy':<24} {'latents':>7} {'keys':>7} {'cache MiB':>9} {'attend ms':>9} {'commit ms':>9}")
    for name, policy in policies(args.window, args.bound).items():
        for latents in args.latents:
            clip = ClipSpec(
                height=args.size[0], width=args.size[1], horizons=(1 + TIME_STRIDE * (latents - 1),),
                block_latents=args.block_latents,
            )  # fmt: skip
            plan = MemoryPlan.of(NETS[args.net](), clip, policy)
            attention, commit = measure(plan, dtype=dtype, device=device, repeats=args.repeats)
            mib = plan.bytes(latents, dtype=dtype) / 2**20
            row = f"{name:<24} {latents:>7} {plan.tokens(latents):>7} {mib:>9.1f}"
            print(f"{row} {1e3 * attention:>9.2f} {1e3 * commit:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
