r"""A step of causal initialisation by blocks of the clip: time and model FLOPs utilisation.

The real loss, forward and backward, of `CausalInit`, bf16 autocast over float32 master weights, without the
optimiser; weights and trajectories are random. It runs as it is (eager), recorded as a CUDA graph, with
compiled blocks, and with both; the first run is printed too, which compiles.

    python benchmarks/causal_init.py --net tiny --size 128 256 --batch 16 --ways eager recorded compiled
    python benchmarks/causal_init.py --forcing teacher --block_latents 2 --batch 8 --blocks 40 \
        --rays 0.767327 --ways eager both --kernels 20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from machine import describe_machine
from step import NETS, PEAK, now
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from relic.modules import CausalInit
from relic.ops.masks import FORCINGS
from relic.parallel import Compute, Recorder
from relic.types import TIME_STRIDE, Batch, ClipSpec

WAYS = ["eager", "recorded", "compiled", "both"]


def batch_of(module: CausalInit, *, samples: int, device: torch.device) -> Batch:
    """Return random trajectories of the longest horizon."""
    config, clip = module.net_config, module.clip
    latents = 1 + (clip.max_frames - 1) // TIME_STRIDE
    size = (samples, module.student.sampler.steps + 1, latents, config.latent_channels)
    grid = clip.latent_height, clip.latent_width
    actions = torch.rand(samples, clip.max_frames, 13, device=device) / 20
    text = torch.randn(samples, config.text_length, config.text_width, device=device)
    return Batch(
        latents=None, trajectory=torch.randn(*size, *grid, device=device), video=None, actions=actions,
        text=text, d_bar=torch.ones(samples, dtype=torch.float64), key=torch.arange(samples),
    )  # fmt: skip


def take_step(
    module: CausalInit, learn: Callable[..., Tensor], blocks: int, *, batch: Batch, steps: Tensor
) -> None:
    """Prepare a batch, run forward and backward pass, and set the gradients to zero."""
    half = batch.actions.is_cuda
    with torch.autocast(batch.actions.device.type, torch.bfloat16, enabled=half):
        learn(module.given(batch, blocks=blocks, steps=steps), parts=1)
    module.zero_grad(set_to_none=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=list(NETS), default="tiny")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256])
    parser.add_argument("--frames", type=int, default=321)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block_latents", type=int, default=4)
    parser.add_argument("--forcing", choices=FORCINGS, default="hybrid")
    parser.add_argument("--rays", type=float, default=0.0, help="half the picture's width in focal lengths")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 5, 10, 15, 20])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=["eager"])
    parser.add_argument("--kernels", type=int, default=0, help="print the longest of a step")
    parser.add_argument("--keep", choices=["all", "products", "attention", "inputs"], default="all")
    args = parser.parse_args()
    print(describe_machine())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    clip = ClipSpec(
        height=args.size[0], width=args.size[1], horizons=(args.frames,), block_latents=args.block_latents
    )
    net = NETS[args.net](rope_factor=max(1.0, (1 + (args.frames - 1) // TIME_STRIDE) / 21))
    if args.rays:
        net = replace(net, control=replace(net.control, rays=args.rays))
    residual: Any = "bfloat16" if gpu else "float32"
    flops: dict[int, float] = {}
    for way in args.ways:
        torch.compiler.reset()  # or what another way compiled would be made general for this one
        compute = Compute(keep=args.keep, residual=residual, compile_blocks=way in ("compiled", "both"))
        module = CausalInit(net=net, clip=clip, forcing=args.forcing, compute=compute, ema_decay=None)
        with torch.device(device):
            module.configure_model()
        module.to(device)
        batch = batch_of(module, samples=args.batch, device=device)
        steps = torch.randint(module.student.sampler.steps, (args.batch, max(args.blocks)), device=device)
        learn = Recorder(module.parameters).of(module.learn) if way in ("recorded", "both") else module.learn
        step = partial(take_step, module, learn, batch=batch, steps=steps)
        for blocks in args.blocks:
            start = now()
            if way == "eager" and args.keep == "all":
                # the kernel that takes segments is none that is counted
                whole = patch("relic.nn.attention._takes_segments", return_value=False)
                with whole, FlopCounterMode(display=False) as counter:
                    step(blocks)
                flops[blocks] = float(counter.get_total_flops())
            else:
                step(blocks)
            first = now() - start
            times = []
            for _ in range(args.rounds):
                start = time.perf_counter()
                step(blocks)
                times.append(now() - start)
            seconds = sorted(times)[len(times) // 2]
            used = f", MFU {flops[blocks] / seconds / PEAK:.1%}" if gpu and blocks in flops else ""
            if args.kernels:
                with torch.profiler.profile() as profiler:
                    step(blocks)
                    now()
                by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
                print(profiler.key_averages().table(by, row_limit=args.kernels, max_name_column_width=70))
            print(
                f"{blocks:>3} blocks, {way:<9} {1000 * seconds:8.1f} ms{used} (first {first:.1f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
