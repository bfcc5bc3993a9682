"""A step of self-forcing, the student's and the critic's: time and peak memory, and those of one graph.

The real thing: `SelfForcing` under a Lightning Trainer with student, moving average, critic, teacher and two
AdamW, bf16 autocast over float32 master weights; weights, images and prompts are random. One graph is what
replay stands in for: the last denoising step of all blocks, with the keys and values that each saw, kept for
one backward pass.

    python benchmarks/self_forcing.py --net 1b --size 480 832 --frames 81 321 --keep inputs
    python benchmarks/self_forcing.py --net tiny --size 128 256 --frames 81 321 --batch 16
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning import Callback, Trainer
from machine import describe_machine
from step import NETS, RandomLatents, now
from torch import Tensor, nn

from relic.modules import SelfForcing
from relic.modules.student import StudentModule
from relic.nn.checkpoints import WeightsSource
from relic.nn.denoiser import Denoiser
from relic.parallel import Compute, apply_compute
from relic.rollout import KeyedNoise, Trace
from relic.types import Batch, ClipSpec, latents_of

GIB = 2**30


class RandomWeights(SelfForcing):
    """Self-forcing from no file, and to none."""

    def setup(self, stage: str) -> None:
        StudentModule.setup(self, stage)

    def _score(self, plan: Compute) -> Denoiser:
        net = self.student.build()
        apply_compute(net.dit, plan)
        return net

    def export(self, path: Any) -> None:
        pass


class OneGraph(RandomWeights):
    """All blocks are computed again before one backward pass."""

    losses: list[Tensor] | None = None

    def replay(self, batch: Batch, image: Tensor, traces: Sequence[Trace]) -> Iterator[tuple[slice, Tensor]]:
        self.losses = []
        noise = KeyedNoise(tuple(batch.key.tolist()), (self.seed, self.stage, "rollout"))
        rollout = self.rollout(self.trained, noise=noise, like=image)
        rollout.prefill(image, batch.actions[:, :1], text=batch.text)
        for trace, x0 in rollout.replay(traces):
            at = self.plan.block(trace.block)
            rollout.memory = rollout.memory.fork()  # each block's graph holds the memory that it saw
            yield slice(at.start, at.stop), x0

    def _backward(self, loss: Tensor) -> None:
        if self.losses is None:
            super()._backward(loss)
        else:
            self.losses.append(loss)

    def _finish(self, turn: Any, batch: Batch) -> None:
        if self.losses is not None:
            losses, self.losses = self.losses, None
            super()._backward(torch.stack(losses).sum())
        super()._finish(turn, batch)


class Watch(Callback):
    """Time and peak memory of each step."""

    def __init__(self) -> None:
        self.taken: dict[str, tuple[float, int]] = {}
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._turn, self._start = pl_module.turns.of(trainer.global_step), now()

    def on_train_batch_end(self, *args: Any) -> None:
        seconds = now() - self._start
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self.taken[self._turn] = seconds, peak  # of the last one


def measure(kind: type[RandomWeights], args: argparse.Namespace, frames: int) -> dict[str, str]:
    """Return what the steps of a horizon took, in words; running out of memory is a result as well."""
    clip = ClipSpec(height=args.size[0], width=args.size[1], horizons=(frames,))
    half: Any = "bfloat16" if torch.cuda.is_available() else "float32"
    compute = Compute(keep=args.keep, residual=half)
    watch = Watch()
    module: nn.Module | None = None
    net = NETS[args.net](rope_factor=max(1.0, latents_of(frames) / 21))
    try:
        module = kind(
            net=net, clip=clip, teacher=WeightsSource(path="none"), teacher_rope_factor=net.rope_factor,
            compute=compute, score_compute=compute, critic_ratio=1, critic_only_steps=0,
        )  # fmt: skip
        trainer = Trainer(
            max_steps=2 * args.rounds, accelerator="auto", devices=1, logger=False, limit_val_batches=0,
            precision="bf16-mixed" if torch.cuda.is_available() else "32-true", enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False, use_distributed_sampler=False,
            callbacks=[watch], default_root_dir=tempfile.mkdtemp(),
        )  # fmt: skip
        trainer.fit(module, RandomLatents(net, clip, batch=args.batch, steps=2 * args.rounds))
    except torch.OutOfMemoryError:
        pass
    del module
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    told = {name: f"{seconds:.2f} s, {peak / GIB:.1f} GiB" for name, (seconds, peak) in watch.taken.items()}
    return {name: told.get(name, "out of memory") for name in ("student", "critic")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=list(NETS), default="1b")
    parser.add_argument("--frames", type=int, nargs="+", default=[81, 321])
    parser.add_argument("--size", type=int, nargs=2, default=[480, 832])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="steps of each network; the last is reported")
    parser.add_argument("--keep", choices=["all", "products", "attention", "inputs"], default="inputs")
    parser.add_argument("--no_graph", action="store_true", help="leave the one graph out")
    args = parser.parse_args()
    print(describe_machine())
    print(f"{args.net} at {args.size[0]}x{args.size[1]}, batch {args.batch}, {args.keep} kept", flush=True)
    for frames in args.frames:
        ours = measure(RandomWeights, args, frames)
        print(
            f"{latents_of(frames):>3} latents  student {ours['student']}  critic {ours['critic']}", flush=True
        )
        if not args.no_graph:
            whole = measure(OneGraph, args, frames)
            print(f"{latents_of(frames):>3} latents  student, one graph: {whole['student']}", flush=True)


if __name__ == "__main__":
    main()
