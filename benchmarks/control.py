"""Is control used? Held-out loss of a tiny teacher with true, exchanged and mirrored actions, by seed.

Exchanged: clips are ranked by mean speed and neighbours swap actions, so that only the motion is wrong.
Usage: python benchmarks/control.py LATENTS --steps 3000 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from lightning import Trainer
from machine import describe_machine
from sizes import small

from relic.data import WorldDataModule
from relic.modules import TeacherExtension
from relic.nn.text import WordTableConfig
from relic.ops.actions import exchange_actions, mirror_actions
from relic.parallel import Compute
from relic.types import Batch, ClipSpec


def fit(args: argparse.Namespace, *, seed: int) -> tuple[TeacherExtension, WorldDataModule]:
    """Fit one tiny teacher."""
    clip = ClipSpec(height=args.size[0], width=args.size[1], horizons=(args.frames,))
    data = WorldDataModule(
        root=args.latents, clip=clip, content="latents", global_batch=args.batch, workers=args.workers,
        seed=seed, batches_per_epoch=args.steps, evaluation_scenes=0,
        validation_scenes=args.validation_scenes, validation_windows=args.windows,
    )  # fmt: skip
    module = TeacherExtension(
        net=small(latent_channels=args.latent_channels),
        clip=clip, words=WordTableConfig(), seed=seed, warmup_steps=100,
        compute=Compute(compile_blocks=args.compile),
        optimizer=lambda p: torch.optim.AdamW(p, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01),
    )  # fmt: skip
    trainer = Trainer(
        max_steps=args.steps, accelerator="auto", devices=1, precision=args.precision, logger=False,
        enable_checkpointing=False, use_distributed_sampler=False, gradient_clip_val=1.0, limit_val_batches=0,
        num_sanity_val_steps=0, enable_model_summary=False, max_time={"seconds": args.seconds},
        default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.fit(module, data)
    return module, data


def whole(data: WorldDataModule, device: torch.device) -> Batch:
    """Return the validation windows as one batch."""
    batches = list(data.val_dataloader())
    joined = [
        None if column[0] is None else torch.cat(column).to(device) for column in zip(*batches, strict=True)
    ]
    return Batch(*joined)


def loss(module: TeacherExtension, batch: Batch, *, size: int = 16) -> float:
    """Return the mean loss over the buckets with sigma >= 0.5."""
    parts = []
    for start in range(0, len(batch.key), size):
        rows = Batch(*(None if c is None else c[start : start + size] for c in batch))
        buckets = module.bucket_losses(rows)
        high = [value for name, value in buckets.items() if float(name.split("-")[0]) >= 0.5]
        parts.append((torch.stack(high).mean(), len(rows.key)))
    return float(sum(value * count for value, count in parts) / sum(count for _, count in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("latents")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seconds", type=int, default=36000, help="stop fitting after so many seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--latent_channels", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--validation_scenes", type=int, default=8)
    parser.add_argument("--precision", default="bf16-mixed" if torch.cuda.is_available() else "32-true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    print(describe_machine())
    print(
        f"{'seed':>4} {'steps':>6} {'seconds':>8} {'true':>8} {'exchanged':>10} {'mirrored':>9} {'gain':>7}"
    )
    for seed in args.seeds:
        start = time.monotonic()
        module, data = fit(args, seed=seed)
        seconds = time.monotonic() - start
        module = module.to("cuda" if torch.cuda.is_available() else "cpu")
        batch = whole(data, module.device)
        true = loss(module, batch)
        exchanged = loss(module, batch._replace(actions=exchange_actions(batch.actions)))
        mirrored = loss(module, batch._replace(actions=mirror_actions(batch.actions)))
        steps = module.ema_updates
        gain = 1 - true / exchanged
        row = f"{seed:>4} {steps:>6} {seconds:>8.0f} {true:>8.4f} {exchanged:>10.4f} {mirrored:>9.4f}"
        print(f"{row} {gain:>7.1%}", flush=True)


if __name__ == "__main__":
    main()
