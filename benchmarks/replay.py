"""What a step of self-forcing costs: peak memory and time of the student's backward pass, replayed block by
block and as one graph, and of the critic's, by length.

Weights and inputs are random. Peak memory is what a pass takes beside weights, gradients and the student's
memory of the stream, which is printed on its own; with a GPU it is measured, on a CPU it is the size of what
is saved for the backward pass (needs `--keep all`, since checkpoints hide theirs). One graph needs the keys
and values that every block saw. It replaces the last of the denoising steps; so the time ratio is that of
rollout + replay to (steps - 1) / (steps + 1) of the rollout + the pass measured here.

    python benchmarks/replay.py --net 1b --size 480 832 --latents 21 41 81 --keep inputs
    python benchmarks/replay.py --net tiny --size 64 96 --latents 9 17 33
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from machine import describe_machine
from torch import Tensor, nn

from relic.nn.denoiser import Denoiser
from relic.nn.dit import DiTConfig
from relic.nn.memory import Memory
from relic.nn.student import FewSteps, StudentConfig
from relic.ops.actions import controls_of
from relic.ops.dmd import with_gradient
from relic.ops.flow import velocity_of
from relic.ops.losses import flow_matching_loss
from relic.ops.retention import Compressed, Full, Policy, Window
from relic.parallel import Compute, apply_compute
from relic.rollout import KeyedNoise, Rollout, Trace
from relic.types import TIME_STRIDE, ClipSpec

NETS = {"tiny": DiTConfig.tiny, "1b": DiTConfig.wan_1b, "14b": DiTConfig.wan_14b}
POLICIES: dict[str, Callable[[int], Policy]] = {
    "full": lambda window: Full(),
    "window": lambda window: Window(latents=window),
    "compressed": lambda window: Compressed(window=window),
}
GIB = 2**30


@dataclasses.dataclass
class Cost:
    """Seconds and bytes of a pass; None if it ran out of memory."""

    seconds: float | None = None
    bytes: int | None = None

    def __str__(self) -> str:
        if self.seconds is None or self.bytes is None:
            return "      out of memory"
        return f"{self.seconds:8.2f} s {self.bytes / GIB:7.3f} GiB"


class Saved:
    """Counts the storages that graphs hold for their backward passes, parameters apart."""

    def __init__(self, net: nn.Module) -> None:
        self.known = {p.untyped_storage().data_ptr() for p in net.parameters()}
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def pack(self, x: Tensor) -> Holder:
        storage = x.untyped_storage()
        holder = Holder(x)
        if storage.data_ptr() not in self.known:
            self.now += storage.nbytes() if self.holders[storage.data_ptr()] == 0 else 0
            self.holders[storage.data_ptr()] += 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(holder, self.release, storage.data_ptr(), storage.nbytes())
        return holder

    def release(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        self.now -= size if self.holders[pointer] == 0 else 0


class Holder:
    """A saved tensor, for as long as its graph lives."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@contextlib.contextmanager
def measured(net: nn.Module, cost: Cost) -> Iterator[None]:
    """Fill in what the passes inside cost; running out of memory is a result as well."""
    gpu, saved = torch.cuda.is_available(), Saved(net)
    hooks = (
        contextlib.nullcontext()
        if gpu
        else torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda holder: holder.x)
    )
    before = 0
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    try:
        with hooks:
            yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return
    if gpu:
        torch.cuda.synchronize()
    cost.seconds = time.perf_counter() - start
    cost.bytes = torch.cuda.max_memory_allocated() - before if gpu else saved.peak


class Bench:
    """A student, a critic and a batch of one random clip."""

    def __init__(self, config: StudentConfig, *, keep: str, device: torch.device) -> None:
        self.config, self.device, self.plan = config, device, config.plan()
        half = "bfloat16" if device.type == "cuda" else "float32"
        compute = Compute(keep=keep, residual=half)  # type: ignore[arg-type]
        with torch.device(device):
            self.student, self.critic = config.build(), config.build()
        for net in (self.student, self.critic):
            apply_compute(net.dit, compute)
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter)  # they exist in every step but the first
        dit, clip = config.net, config.clip
        count = self.plan.num_latents or 0
        self.x0 = torch.randn(
            1, count, dit.latent_channels, clip.latent_height, clip.latent_width, device=device
        )
        self.actions = torch.rand(1, clip.max_frames, 13, device=device)
        self.text = torch.randn(1, dit.text_length, dit.text_width, device=device)

    def rollout(self, *, exit_step: int | None = None) -> Rollout:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        memory = Memory(self.plan, dtype=dtype, device=self.device)
        rollout = Rollout(
            self.student, memory, noise=KeyedNoise((0,)), sampler=self.config.sampler, exit_step=exit_step
        )
        rollout.prefill(self.x0[:, :1], self.actions[:, :1], text=self.text)
        return rollout

    def traces(self) -> tuple[Trace, ...]:
        rollout = self.rollout(exit_step=self.config.sampler.steps - 1)
        size = TIME_STRIDE * self.plan.block_latents
        for _ in rollout(self.actions[:, 1:].split(size, dim=1), text=self.text):
            pass
        return rollout.traces

    def replay(self, rollout: Rollout, traces: tuple[Trace, ...]) -> None:
        for _, x0 in rollout.replay(traces):
            with_gradient(x0, torch.ones_like(x0)).backward()

    def one_graph(self, rollout: Rollout, traces: tuple[Trace, ...]) -> None:
        losses = []
        for _, x0 in rollout.replay(traces):
            losses.append(with_gradient(x0, torch.ones_like(x0)))
            rollout.memory = rollout.memory.fork()  # each block's graph holds the memory that it saw
        torch.stack(losses).sum().backward()

    def velocity(self, net: Denoiser) -> Tensor:
        sigma = torch.full(self.x0.shape[:2], 0.8, device=self.device)
        sigma[:, 0] = 0.0
        return net(self.x0, sigma=sigma, text=self.text, controls=controls_of(self.actions))

    def fit_critic(self) -> None:
        target = velocity_of(self.x0, torch.randn_like(self.x0))
        weight = torch.ones(self.x0.shape[:2], device=self.device)
        flow_matching_loss(self.velocity(self.critic), target, weight=weight).mean().backward()


def measure(
    config: StudentConfig, *, keep: str, device: torch.device, one_graph: bool, student_only: bool
) -> None:
    """Print a line of figures for a horizon."""
    bench = Bench(config, keep=keep, device=device)
    rolled, scored, replayed, whole, critic = (Cost() for _ in range(5))
    steps = config.sampler.steps
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        bench.traces()  # kernels are chosen
        with measured(bench.student, rolled):
            traces = bench.traces()
        if not student_only:
            with measured(bench.critic, scored), torch.no_grad():
                for _ in range(3):  # critic, and teacher with and without the prompt
                    bench.velocity(bench.critic)
        rollout = bench.rollout()
        with measured(bench.student, replayed):
            bench.replay(rollout, traces)
        memory = rollout.memory.nbytes
        if one_graph:
            rollout = bench.rollout()
            with measured(bench.student, whole):
                bench.one_graph(rollout, traces)
        del rollout
        if not student_only:
            with measured(bench.critic, critic):
                bench.fit_critic()
    ratio = ""
    if None not in (rolled.seconds, replayed.seconds, whole.seconds):
        ours = rolled.seconds + replayed.seconds  # type: ignore[operator]
        theirs = rolled.seconds * (steps - 1) / (steps + 1) + whole.seconds  # type: ignore[operator]
        ratio = f"{ours / theirs:.2f}"
    graph = str(whole) if one_graph else "           not run"
    scores = "   left out" if student_only else f"{scored.seconds or 0:7.2f} s"
    last = "            left out" if student_only else str(critic)
    print(
        f"{bench.plan.num_latents:>7} | {memory / GIB:12.3f} GiB | {rolled.seconds or 0:7.2f} s | "
        f"{scores} | {replayed} | {graph} | {ratio:>5} | {last}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=list(NETS), default="tiny")
    parser.add_argument("--size", type=int, nargs=2, default=[64, 96])
    parser.add_argument("--latents", type=int, nargs="+", default=[9, 17, 33])
    parser.add_argument("--block", type=int, default=4, help="latents of a block")
    parser.add_argument("--policy", choices=list(POLICIES), default="compressed")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--keep", choices=["all", "products", "attention", "inputs"], default="all")
    parser.add_argument("--no_graph", action="store_true", help="leave the one graph out")
    parser.add_argument("--student_only", action="store_true", help="leave scores and critic out")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and args.keep != "all":
        parser.error(f"--keep {args.keep}: without a GPU only what is saved is counted, so use --keep all.")
    print(describe_machine())
    print(
        f"{args.net} at {args.size[0]}x{args.size[1]}, blocks of {args.block}, {args.policy}, window "
        f"{args.window}, {args.steps} steps, {args.keep} kept; memory is "
        f"{'peak allocation' if device.type == 'cuda' else 'peak of what is saved for backward'}"
    )
    names = ("latents", " policy's memory", "  rollout", "   scores", "      replay, backward")
    print(" | ".join((*names, "  one graph, backward", "ratio", "critic, backward")))
    for latents in args.latents:
        clip = ClipSpec(
            height=args.size[0], width=args.size[1], horizons=(1 + TIME_STRIDE * (latents - 1),),
            block_latents=args.block,
        )  # fmt: skip
        config = StudentConfig(
            net=NETS[args.net](rope_factor=max(1.0, latents / 21)), words=None, clip=clip,
            policy=POLICIES[args.policy](args.window), sampler=FewSteps(steps=args.steps),  # type: ignore[arg-type]
        )  # fmt: skip
        measure(
            config, keep=args.keep, device=device, one_graph=not args.no_graph, student_only=args.student_only
        )


if __name__ == "__main__":
    main()
