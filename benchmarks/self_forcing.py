"""A step of self-forcing, the student's and the critic's: time and peak memory, in several ways.

The real thing: `SelfForcing` under a Lightning Trainer with student, moving average, critic, teacher and two
AdamW, bf16 autocast over float32 master weights; weights, images and prompts are random. Ways:

    eager       as it is
    compiled    the blocks of all three networks compiled
    recorded    each turn a CUDA graph, replayed
    both        compiled and recorded
    one_graph   what replay stands in for: the last denoising step of all blocks, with the keys and values
                that each saw, kept for one backward pass

MFU counts all that is needed: rollout, scores, and what is computed again with gradients; but not what
checkpointing computes twice, nor, with `--replay_by clip` on a GPU, attention in the replay.

    python benchmarks/self_forcing.py --net 1b --size 480 832 --frames 81 321 --ways eager one_graph
    python benchmarks/self_forcing.py --net tiny --size 128 256 --frames 81 321 --batch 16 --keep all \\
        --rounds 4 --ways eager compiled recorded both
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer
from machine import describe_machine
from step import NETS, PEAK, RandomLatents, now
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from relic.modules import SelfForcing
from relic.modules.scores import Given
from relic.modules.student import StudentModule
from relic.nn.checkpoints import WeightsSource
from relic.nn.denoiser import Denoiser
from relic.parallel import Compute, apply_compute
from relic.rollout import Trace
from relic.types import Batch, ClipSpec, latents_of

GIB = 2**30
WAYS = ["eager", "compiled", "recorded", "both", "one_graph"]


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

    def replay(self, given: Given, traces: Sequence[Trace]) -> Iterator[tuple[slice, Tensor]]:
        self.losses = []
        rollout, _ = self._begin(given)
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


class Cost(NamedTuple):
    """What a step took."""

    seconds: float
    peak: int
    flops: float


class Watch(Callback):
    """Keeps the cost of the steps of each turn; the first one's FLOPs are counted, if wanted."""

    def __init__(self, *, count: bool) -> None:
        self.taken: dict[str, list[Cost]] = {"student": [], "critic": []}
        self.count = count
        self._counter: FlopCounterMode | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._turn = pl_module.turns.of(trainer.global_step)
        if self.count and not self.taken[self._turn]:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        self._start = now()

    def on_train_batch_end(self, *args: Any) -> None:
        seconds, flops = now() - self._start, 0.0
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            flops, self._counter = float(self._counter.get_total_flops()), None
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self.taken[self._turn].append(Cost(seconds, peak, flops))


def measure(way: str, args: argparse.Namespace, frames: int) -> dict[str, list[Cost]]:
    """Return what the steps of a horizon took; none where memory ran out, which is a result as well."""
    clip = ClipSpec(
        height=args.size[0], width=args.size[1], horizons=(frames,), block_latents=args.block_latents
    )
    half: Any = "bfloat16" if torch.cuda.is_available() else "float32"
    compute = Compute(keep=args.keep, residual=half, compile_blocks=way in ("compiled", "both"))
    watch = Watch(count=way == "eager" and args.keep == "all")
    module: nn.Module | None = None
    net = NETS[args.net](rope_factor=max(1.0, latents_of(frames) / 21))
    kind = OneGraph if way == "one_graph" else RandomWeights
    try:
        module = kind(
            net=net, clip=clip, teacher=WeightsSource(path="none"), teacher_rope_factor=net.rope_factor,
            compute=compute, score_compute=compute, critic_ratio=1, critic_only_steps=0,
            guidance=args.guidance, cuda_graphs=way in ("recorded", "both"), replay_by=args.replay_by,
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
    return watch.taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=list(NETS), default="1b")
    parser.add_argument("--frames", type=int, nargs="+", default=[81, 321])
    parser.add_argument("--size", type=int, nargs=2, default=[480, 832])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--block_latents", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=1, help="steps of each network; the last is reported")
    parser.add_argument("--keep", choices=["all", "products", "attention", "inputs"], default="inputs")
    parser.add_argument("--replay_by", choices=["block", "clip"], default="block")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=["eager", "one_graph"])
    args = parser.parse_args()
    if args.replay_by == "clip" and "one_graph" in args.ways:
        parser.error("--replay_by clip does not go with one_graph, which replays in its own way.")
    print(describe_machine())
    print(f"{args.net} at {args.size[0]}x{args.size[1]}, batch {args.batch}, {args.keep} kept", flush=True)
    for frames in args.frames:
        flops = {"student": 0.0, "critic": 0.0}
        for way in args.ways:
            words = []
            for turn, costs in measure(way, args, frames).items():
                if not costs:
                    words.append(f"{turn} out of memory")
                    continue
                flops[turn] = flops[turn] or costs[0].flops
                used = f", MFU {flops[turn] / costs[-1].seconds / PEAK:.1%}" if flops[turn] else ""
                words.append(
                    f"{turn} {costs[-1].seconds:.3f} s (first {costs[0].seconds:.1f}), "
                    f"{costs[-1].peak / GIB:.1f} GiB{used}"
                )
            print(f"{latents_of(frames):>3} latents, {way:<10} {'; '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
