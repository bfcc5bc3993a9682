"""How long does a tiny teacher's step wait for data? Share of the training time spent in fetching batches.

Usage: python benchmarks/wait.py LATENTS --size 128 256 --frames 81
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from lightning import Trainer
from lightning.pytorch.profilers import SimpleProfiler
from machine import describe_machine
from sizes import small

from relic.data import WorldDataModule
from relic.modules import TeacherExtension
from relic.nn.text import WordTableConfig
from relic.parallel import Compute
from relic.types import ClipSpec

WARM_UP = 10  # steps left out: workers start, kernels compile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("latents")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--latent_channels", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    print(describe_machine())
    clip = ClipSpec(height=args.size[0], width=args.size[1], horizons=(args.frames,))
    data = WorldDataModule(
        root=args.latents, clip=clip, content="latents", global_batch=args.batch, workers=args.workers,
        validation_scenes=0, evaluation_scenes=0,
    )  # fmt: skip
    compute = Compute(compile_blocks=args.compile)
    net = small(latent_channels=args.latent_channels)
    module = TeacherExtension(net=net, clip=clip, words=WordTableConfig(), compute=compute)
    profiler = SimpleProfiler()
    gpu = torch.cuda.is_available()
    Trainer(
        max_steps=args.steps + WARM_UP, accelerator="auto", devices=1, logger=False,
        precision="bf16-mixed" if gpu else "32-true", enable_checkpointing=False,
        use_distributed_sampler=False, limit_val_batches=0, enable_model_summary=False, profiler=profiler,
        default_root_dir=tempfile.mkdtemp(),
    ).fit(module, data)  # fmt: skip
    fetch, step = (
        next(times for name, times in profiler.recorded_durations.items() if part in name)
        for part in ("train_dataloader_next", "run_training_batch")
    )
    waiting, working = sum(fetch[WARM_UP : WARM_UP + args.steps]), sum(step[WARM_UP:])
    print(f"{args.batch} clips a step of {1e3 * working / args.steps:.1f} ms, {args.workers} workers")
    print(
        f"waiting {1e3 * waiting / args.steps:.2f} ms a step, {waiting / (waiting + working):.1%} of the time"
    )


if __name__ == "__main__":
    main()
