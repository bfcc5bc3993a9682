"""The replay of self-forcing alone: time and FLOPs utilisation, by block and by clip.

The replay of `SelfForcing` with its backward passes, bf16 autocast over float32 master weights, of clips
that were rolled out before; weights and inputs are random. It runs as it is (eager), recorded as a CUDA
graph, and with compiled blocks as well (both). FLOPs are those of the replay by block, its commits included:
by clip, all of this but the last commit is computed as well. With `--keep` other than all they count what is
computed twice.

    python benchmarks/replay_step.py --batch 4 8 16
    python benchmarks/replay_step.py --size 64 96 --frames 33 --batch 1 --ways eager
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from machine import describe_machine
from self_forcing import RandomWeights
from step import NETS, PEAK, RandomLatents, now
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from relic.modules.scores import Given
from relic.nn.checkpoints import WeightsSource
from relic.ops.dmd import with_gradient
from relic.parallel import Compute, Recorder
from relic.types import ClipSpec, latents_of

WAYS = ["eager", "recorded", "both"]


class Replay:
    """The replay of one batch of clips, as a function of tensors."""

    def __init__(self, args: argparse.Namespace, *, batch: int, device: torch.device, compiled: bool) -> None:
        clip = ClipSpec(
            height=args.size[0], width=args.size[1], horizons=(args.frames,), block_latents=args.block_latents
        )
        net = NETS[args.net](rope_factor=max(1.0, latents_of(args.frames) / 21))
        half: Any = "bfloat16" if device.type == "cuda" else "float32"
        self.module = RandomWeights(
            net=net, clip=clip, teacher=WeightsSource(path="none"), teacher_rope_factor=net.rope_factor,
            compute=Compute(keep=args.keep, residual=half, compile_blocks=compiled), ema_decay=None,
        )  # fmt: skip
        with torch.device(device):
            self.module.configure_model()
        self.module.to(device)
        self.recorder = self.module.recorder = Recorder(self.module.trained.parameters)
        latents = RandomLatents(net, clip, batch=batch, steps=1)
        data = latents.transfer_batch_to_device(latents.batch, device, 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            given = self.module.given(data)
            _, self.traces = self.module.roll_out(given, exit_step=self.module.scored_step())
        self.given = given, tuple((trace.xt, trace.context) for trace in self.traces)

    def __call__(self, given: tuple[Given, tuple[tuple[Tensor, Tensor], ...]], *, by: str) -> None:
        start, tensors = given
        traces = [
            trace._replace(xt=xt, context=context, text=start.text)
            for trace, (xt, context) in zip(self.traces, tensors, strict=True)
        ]
        self.module.replay_by = by  # type: ignore[assignment]
        half = start.prefix.is_cuda
        with torch.autocast(start.prefix.device.type, torch.bfloat16, enabled=half):
            for _, again in self.module.replay(start, traces):
                with_gradient(again, torch.ones_like(again)).backward()

    def clear(self) -> None:
        self.module.zero_grad(set_to_none=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=list(NETS), default="tiny")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256])
    parser.add_argument("--frames", type=int, default=321)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--block_latents", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", choices=["all", "products", "attention", "inputs"], default="all")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe_machine())
    for batch in args.batch:
        plain = Replay(args, batch=batch, device=device, compiled=False)
        with FlopCounterMode(display=False) as counter:
            plain(plain.given, by="block")
        flops = counter.get_total_flops()
        plain.clear()
        for way in args.ways:
            torch.compiler.reset()  # or what was compiled for another batch would be made general
            replay = Replay(args, batch=batch, device=device, compiled=True) if way == "both" else plain
            for by in ("block", "clip"):
                run = replay if way == "eager" else replay.recorder.of(replay.__call__)
                times = []
                for _ in range(2 + args.rounds):  # the first ones compile and record
                    start = now()
                    run(replay.given, by=by)
                    replay.clear()
                    times.append(now() - start)
                seconds = sorted(times[2:])[args.rounds // 2]
                used = f", MFU {flops / seconds / PEAK:.1%}" if device.type == "cuda" else ""
                print(
                    f"{latents_of(args.frames)} latents, batch {batch}, by {by:<5} {way:<8} "
                    f"{1000 * seconds:8.1f} ms{used} (first {times[0]:.1f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
