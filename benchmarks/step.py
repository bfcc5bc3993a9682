"""A teacher's training step: tokens a second, model FLOPs utilisation, peak memory.

The real thing: `TeacherExtension` under a Lightning Trainer, bf16 autocast over float32 master weights, AdamW
and moving average included; weights and latents are random. FLOPs are those of the model, without what is
computed twice: 6 x parameters x tokens, and three times the forward pass of attention.

    python benchmarks/step.py --net 1b --frames 81 --size 480 832
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback, Trainer
from machine import describe_machine
from torch.utils.data import DataLoader

from relic.data.collate import keys_from
from relic.modules import TeacherExtension
from relic.nn.dit import DiTConfig
from relic.parallel import Compute
from relic.types import PATCH, Batch, ClipSpec, latents_of

WARM_UP = 3  # steps: kernels are compiled and chosen
PEAK = 989e12  # dense bf16 FLOP/s of an H100 SXM, by its data sheet
NETS = {"tiny": DiTConfig.tiny, "1b": DiTConfig.wan_1b, "14b": DiTConfig.wan_14b}


class RandomLatents(lightning.LightningDataModule):
    """Yields one random batch again and again."""

    def __init__(self, config: DiTConfig, clip: ClipSpec, *, batch: int, steps: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shape = (latents_of(clip.max_frames), config.latent_channels, clip.latent_height, clip.latent_width)
        actions = torch.zeros(batch, clip.max_frames, 13)
        actions[:, 1:, 0] = 1.0
        self.steps = steps
        self.batch = Batch(
            latents=torch.randn(batch, *shape, generator=draw), trajectory=None, video=None, actions=actions,
            text=torch.randn(batch, config.text_length, config.text_width, generator=draw),
            d_bar=torch.ones(batch, dtype=torch.float64), key=torch.arange(batch),
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch] * self.steps, batch_size=None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return keys_from(batch, super().transfer_batch_to_device(batch, device, dataloader_idx))


class Unexported(TeacherExtension):
    """Leaves nothing on disk."""

    def export(self, path: Path) -> None:
        pass


class Stopwatch(Callback):
    """Times all steps after the first few as one stretch: between them the device is not waited for."""

    def __init__(self, *, warm_up: int) -> None:
        self.warm_up, self.seconds, self.steps = warm_up, 0.0, 0
        self._start = 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.warm_up:
            self._start = now()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        self.steps = trainer.global_step - self.warm_up

    def on_train_end(self, *args: Any) -> None:
        self.seconds = now() - self._start


def now() -> float:
    """Return the time in seconds, with the device idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def flops_of_a_step(config: DiTConfig, *, parameters: int, latents: int, tokens: int, batch: int) -> float:
    """Return the model FLOPs of a forward and backward pass."""
    pairs = tokens**2 + tokens * config.text_length
    attention = 4 * config.depth * config.width * pairs  # q·k and p·v, a multiplication and an addition each
    return batch * (6.0 * parameters * tokens + 3.0 * attention)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=list(NETS), default="1b")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--size", type=int, nargs=2, default=[480, 832])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--keep", choices=["all", "products", "attention", "inputs"], default="products")
    parser.add_argument("--residual", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    print(describe_machine())
    config = NETS[args.net]()
    clip = ClipSpec(height=args.size[0], width=args.size[1], horizons=(args.frames,))
    compute = Compute(keep=args.keep, compile_blocks=not args.eager, residual=args.residual)
    gpu = torch.cuda.is_available()
    watch = Stopwatch(warm_up=WARM_UP)
    trainer = Trainer(
        max_steps=args.steps + WARM_UP, accelerator="auto", devices=1, gradient_clip_val=1.0,
        precision="bf16-mixed" if gpu else "32-true", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, use_distributed_sampler=False,
        limit_val_batches=0, callbacks=[watch], default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    module = Unexported(net=config, clip=clip, compute=compute)
    trainer.fit(module, RandomLatents(config, clip, batch=args.batch, steps=args.steps + WARM_UP))
    seconds = watch.seconds / watch.steps
    parameters = sum(p.numel() for p in module.trained.parameters())
    latents = latents_of(args.frames)
    tokens = latents * (clip.latent_height // PATCH) * (clip.latent_width // PATCH)
    flops = flops_of_a_step(config, parameters=parameters, latents=latents, tokens=tokens, batch=args.batch)
    print(
        f"{args.net}, {parameters / 1e6:.1f} M parameters, batch {args.batch} of {latents} latents at "
        f"{args.size[0]}x{args.size[1]} ({tokens} tokens), {args.keep} kept, "
        f"{args.residual} residual, {'eager' if args.eager else 'compiled'}"
    )
    print(f"step {seconds:.3f} s, {args.batch * tokens / seconds:,.0f} tokens/s, {flops / 1e12:.0f} TFLOP")
    if gpu:
        print(
            f"MFU {flops / seconds / PEAK:.1%} of {PEAK / 1e12:.0f} TFLOP/s, peak memory "
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        )


if __name__ == "__main__":
    main()
