"""Do rays help? One small teacher with the paper's control, one with attention that knows where tokens look.

Both are fitted alike to the same latents, from the same seed. Told are the loss on held-out scenes and, for
samples along held-out paths from one image, PSNR by quarters of the clip, beside the first frame repeated and
truth through the autoencoder.

    relic render --out runs/clips --scenes 48 --minutes 24 --size 64 96 --seed 0
    relic encode runs/clips --out runs/latents --vae tiny_vae.safetensors --horizon 33 --stride_seconds 0.5
    python benchmarks/rays.py runs/latents --clips runs/clips --vae tiny_vae.safetensors
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time

import torch
from lightning import Trainer
from machine import describe_machine
from sizes import small
from torch import Tensor

from relic.data import WorldDataModule, read_clips
from relic.engine.capture import FIELD_OF_VIEW_DEG
from relic.metrics import psnr
from relic.modules import TeacherExtension
from relic.nn.control import ControlConfig
from relic.nn.denoiser import EulerSampler
from relic.nn.text import WordTableConfig
from relic.parallel import Muon
from relic.types import Clip, ClipSpec


def fitted(args: argparse.Namespace, clip: ClipSpec, *, rays: float) -> TeacherExtension:
    """Fit a teacher; say its loss and seconds."""
    control = ControlConfig(width=64, rays=rays, inverse_depths=tuple(args.inverse_depths))
    module = TeacherExtension(
        net=small(control=control), clip=clip,
        words=WordTableConfig(), vae=args.vae, level_shift=3.0, ema_decay=0.99, warmup_steps=20,
        seed=args.seed, optimizer=lambda p: Muon(p, lr=args.lr),
        sampler=EulerSampler(steps=20, shift=3.0, guidance=1.0),
    )  # fmt: skip
    data = WorldDataModule(
        root=args.latents, content="latents", clip=clip, global_batch=args.batch,
        batches_per_epoch=args.steps, workers=args.workers, seed=args.seed, validation_scenes=args.held,
        evaluation_scenes=0, validation_windows=4,
    )  # fmt: skip
    folder = tempfile.TemporaryDirectory()  # of the exported weights, which no one needs
    trainer = Trainer(
        default_root_dir=folder.name, max_steps=args.steps, devices=1, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    start = time.monotonic()
    trainer.fit(module, data)
    folder.cleanup()
    loss = float(trainer.callback_metrics["val/loss_flow"])
    print(
        f"{'rays' if rays else 'paper':<6} loss {loss:.3f} after {time.monotonic() - start:.0f} s", flush=True
    )
    return module.eval()


def quarters(videos: list[Tensor], clips: list[Clip]) -> str:
    """Return PSNR by quarters, the given first frame left out."""
    scores = torch.stack([psnr(v[1:], c.video[1:]) for v, c in zip(videos, clips, strict=True)])
    return "  ".join(f"{float(part.mean()):5.2f}" for part in scores.chunk(4, dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("latents", help="folder of latents")
    parser.add_argument("--clips", required=True, help="folder of the recordings that they were encoded from")
    parser.add_argument("--vae", required=True, help="weights of the autoencoder (safetensors)")
    parser.add_argument("--size", type=int, nargs=2, default=[64, 96])
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--inverse_depths", type=float, nargs="+", default=[0.025, 0.01, 0.0])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--held", type=int, default=8, help="scenes held out")
    parser.add_argument("--count", type=int, default=24, help="clips sampled")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["paper", "rays"], help="fit one of the two")
    args = parser.parse_args()
    clip = ClipSpec(height=args.size[0], width=args.size[1], horizons=(args.frames,))
    views = {"paper": 0.0, "rays": math.tan(math.radians(FIELD_OF_VIEW_DEG) / 2)}
    print(describe_machine())
    clips = read_clips(
        args.clips, split="validation", num_clips=args.count, num_frames=args.frames, seed=args.seed,
        validation_scenes=args.held, evaluation_scenes=0,
    )  # fmt: skip
    for name, rays in views.items():
        if args.only in (None, name):
            module = fitted(args, clip, rays=rays)
            print(f"{name:<30} {quarters(module.generate(clips, seed=args.seed), clips)}", flush=True)
    first = [c.video[:1].expand_as(c.video) for c in clips]
    print(f"{'first frame repeated':<30} {quarters(first, clips)}")
    print(f"{'truth through the autoencoder':<30} {quarters(module.reconstruct(clips), clips)}")


if __name__ == "__main__":
    main()
