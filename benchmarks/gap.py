"""What does tuning on actions cost the prior, and what does it buy? Four ways from one plain teacher, drawn.

Plain video is many houses of one seed, action video few houses of another; both are flown alike. A teacher
without control is fitted on the plain video as text-to-video (first latent noised). From it four arms are
tuned on the actions, with the gap probe on held-out houses of both:

    full            all weights from the first step
    control_first   the control layers alone for --control_steps, then all weights
    mixed           all weights; --share of every batch is plain video without controls
    low_rank        the control layers, and an update of rank --rank beside the frozen rest

Writes gap.json (every measurement) and gap.png (a panel an arm: prior kept against control gained). Every
stage is left out if its product is there, and a stopped fit goes on from its last checkpoint. Once there is a
prior, several GPUs can share the arms, each with `--arms` of its own; who comes last draws.

Usage: python benchmarks/gap.py runs/gap
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from machine import describe_machine
from sizes import small

from relic.callbacks import GapProbe, HeldOut
from relic.data import PlainVideo, WorldDataModule
from relic.data.index import INDEX_NAME
from relic.modules import Autoencoder, TeacherExtension
from relic.nn.checkpoints import WeightsSource
from relic.nn.control import ControlConfig
from relic.nn.dit import DiTConfig
from relic.nn.text import WordTableConfig
from relic.nn.tiny_vae import TinyVAEConfig
from relic.nn.tuning import ControlFirst, FullTuning, LowRank, Tuning
from relic.types import ClipSpec
from relic.verbs.encode import encode
from relic.verbs.render import render

PLAIN_SEED, ACTION_SEED = 101, 202
ARMS = ("full", "control_first", "mixed", "low_rank")
PLAIN_HELD, ACTION_HELD = 2, 1  # scenes that nothing is fitted on


class Arm(NamedTuple):
    """A way to take the plain teacher to actions."""

    tuning: Tuning
    plain: PlainVideo | None = None


class Keep(Callback):
    """Writes what a probe has measured, each time."""

    def __init__(self, probe: GapProbe, path: Path) -> None:
        self.probe, self.path = probe, path

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.probe.history, indent=1))

    on_train_start = on_validation_end  # step 0 is measured before


def main() -> None:
    args = parse_args()
    root = Path(args.out)
    print(describe_machine(), flush=True)
    own = ("out", "workers", "arms")  # of one process, not of the experiment
    claim(root, {name: value for name, value in vars(args).items() if name not in own})
    plain, actions, vae = latents_of_worlds(args, root)
    clip = ClipSpec(height=args.size[0], width=args.size[1], horizons=(args.frames,))
    prior = fit_prior(args, root / "prior", clip=clip, latents=plain, vae=vae)
    mix = PlainVideo(root=str(plain), share=args.share, validation_scenes=PLAIN_HELD, evaluation_scenes=0)
    arms = {
        "full": Arm(FullTuning()),
        "control_first": Arm(ControlFirst(control_steps=args.control_steps)),
        "mixed": Arm(FullTuning(), mix),
        "low_rank": Arm(LowRank(rank=args.rank)),
    }
    for name in args.arms or arms:
        arm = arms[name]
        held = [
            HeldOut(root=str(data), validation_scenes=scenes, evaluation_scenes=0)
            for data, scenes in ((plain, PLAIN_HELD), (actions, ACTION_HELD))
        ]
        probe = GapProbe(*held, num_clips=args.clips, batch=args.batch, first_latent="noised")
        with stage(name, root / name / "teacher.safetensors") as wanted:
            if wanted:
                fit_arm(args, root / name, arm, clip=clip, latents=actions, vae=vae, prior=prior, probe=probe)
    waiting = [name for name in arms if not (root / name / "teacher.safetensors").exists()]
    if waiting:
        print(f"Left to others: {', '.join(waiting)}")
        return
    histories = {name: json.loads((root / name / "history.json").read_text()) for name in arms}
    report = {"machine": describe_machine().splitlines(), "settings": vars(args), "arms": histories}
    (root / "gap.json").write_text(json.dumps(report, indent=1))
    draw(histories, root / "gap.png")
    show(histories)
    print(f"Wrote {root / 'gap.json'} and {root / 'gap.png'}")


def claim(root: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a run, or check that it goes on with the same ones."""
    path = root / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        for name, value in settings.items():
            if found[name] != value:
                sys.exit(f"{root} was run with {name}={found[name]}, now {value}: take another folder.")
        return
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))


@contextmanager
def stage(name: str, product: Path) -> Iterator[bool]:
    """Say whether a stage is wanted, and how long it took."""
    if product.exists():
        print(f"{name}: {product} is there already", flush=True)
        yield False
        return
    start = time.monotonic()
    print(f"{name} ...", flush=True)
    yield True
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def latents_of_worlds(args: argparse.Namespace, root: Path) -> tuple[Path, Path, Path]:
    """Render and encode both sets -> latents of plain video and of actions, and the autoencoder's weights."""
    sizes = {"plain": (PLAIN_SEED, *args.plain), "actions": (ACTION_SEED, *args.actions)}
    for name, (seed, scenes, minutes) in sizes.items():
        with stage(f"render {name}", root / f"clips_{name}" / INDEX_NAME) as wanted:
            if wanted:
                render(
                    out=str(root / f"clips_{name}"), scenes=int(scenes), minutes=minutes, seed=seed,
                    size=tuple(args.size), workers=args.workers,
                )  # fmt: skip
    vae = Path(args.vae) if args.vae else fit_vae(args, root / "autoencoder", clips=root / "clips_plain")
    for name in sizes:
        with stage(f"encode {name}", root / f"latents_{name}" / INDEX_NAME) as wanted:
            if wanted:
                encode(
                    str(root / f"clips_{name}"), out=str(root / f"latents_{name}"), vae=str(vae),
                    horizon=(args.frames,), stride_seconds=args.stride, workers=args.workers,
                )  # fmt: skip
    return root / "latents_plain", root / "latents_actions", vae


def fit_vae(args: argparse.Namespace, root: Path, *, clips: Path) -> Path:
    """Fit a small autoencoder on the plain video -> its weights."""
    clip = ClipSpec(height=args.size[0], width=args.size[1], horizons=(17,))
    product = root / "tiny_vae.safetensors"
    with stage("autoencoder", product) as wanted:
        if wanted:
            module = Autoencoder(
                net=TinyVAEConfig(latent_channels=args.channels, patch=4, widths=(48, 64),
                                  encoder_depths=(1, 1), decoder_depths=(1, 1)),
                clip=clip, window_frames=9, latent_noise=0.1, ema_decay=0.98, warmup_steps=20,
                optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
            )  # fmt: skip
            data = WorldDataModule(
                root=str(clips), clip=clip, content="video", global_batch=4, batches_per_epoch=100, workers=0,
                balance=0.0, validation_scenes=PLAIN_HELD, evaluation_scenes=0, validation_windows=4,
            )  # fmt: skip
            fit(args, module, data, root=root, seconds=args.seconds[0])
    return product


def teacher(args: argparse.Namespace, *, lr: float, **settings: Any) -> TeacherExtension:
    """Make a tiny teacher."""
    return TeacherExtension(
        words=WordTableConfig(), ema_decay=0.99, warmup_steps=20, level_shift=3.0,
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
        **settings,
    )  # fmt: skip


def network(args: argparse.Namespace, **changes: Any) -> DiTConfig:
    return small(latent_channels=args.channels, **changes)


def latents_module(args: argparse.Namespace, root: Path, *, held: int, **settings: Any) -> WorldDataModule:
    return WorldDataModule(
        root=str(root), content="latents", global_batch=args.batch, batches_per_epoch=100, workers=0,
        validation_scenes=held, evaluation_scenes=0, validation_windows=args.batch, **settings,
    )  # fmt: skip


def fit_prior(
    args: argparse.Namespace, root: Path, *, clip: ClipSpec, latents: Path, vae: Path
) -> WeightsSource:
    """Fit a plain teacher without control, as text-to-video -> where the arms start."""
    product = root / "teacher.safetensors"
    with stage("prior", product) as wanted:
        if wanted:
            module = teacher(
                args, lr=args.prior_lr, net=network(args, control=None), clip=clip, first_latent="noised",
                vae=str(vae),
            )  # fmt: skip
            data = latents_module(args, latents, held=PLAIN_HELD, clip=clip, vae=str(vae))
            fit(args, module, data, root=root, seconds=args.seconds[1])
            print(f"prior: {module.ema_updates} steps", flush=True)
    rope = "match" if args.rope_factor == 1.0 else "restate"
    return WeightsSource(path=str(product), missing=("control",), rope_factor=rope)


def fit_arm(
    args: argparse.Namespace,
    root: Path,
    arm: Arm,
    *,
    clip: ClipSpec,
    latents: Path,
    vae: Path,
    prior: WeightsSource,
    probe: GapProbe,
) -> None:
    """Tune the plain teacher on actions in one way."""
    module = teacher(
        args, lr=args.lr, clip=clip, vae=str(vae), init=prior, tuning=arm.tuning,
        net=network(args, control=ControlConfig(width=64), rope_factor=args.rope_factor),
    )  # fmt: skip
    data = latents_module(args, latents, held=ACTION_HELD, clip=clip, vae=str(vae), plain=arm.plain)
    callbacks = [probe, Keep(probe, root / "history.json")]
    fit(args, module, data, root=root, seconds=args.seconds[2], steps=args.steps, callbacks=callbacks)


def fit(
    args: argparse.Namespace,
    module: LightningModule,
    data: LightningDataModule,
    *,
    root: Path,
    seconds: int,
    steps: int = -1,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Fit for so many seconds or steps, from the last checkpoint if there is one."""
    # after validation, so that what was measured is in the checkpoint
    saving = ModelCheckpoint(
        root / "checkpoints", save_last=True, save_top_k=0, save_on_train_epoch_end=False
    )
    trainer = Trainer(
        max_time={"seconds": seconds}, max_steps=steps, accelerator="auto", devices=1, logger=False,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true", gradient_clip_val=1.0,
        use_distributed_sampler=False, num_sanity_val_steps=0, enable_model_summary=False,
        enable_progress_bar=False, default_root_dir=root, callbacks=[*callbacks, saving],
        val_check_interval=args.every, check_val_every_n_epoch=None,
    )  # fmt: skip
    last = root / "checkpoints" / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)


def draw(histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw prior kept against control gained over training, a panel an arm, on the same axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(histories), figsize=(3.2 * len(histories), 3.4), sharex=True, sharey=True
    )
    most = max(history[-1]["step"] for history in histories.values())
    for panel, (name, history) in zip(axes, histories.items(), strict=True):
        gain = [100 * row["gap/control_gain"] for row in history]
        kept = [100 * row["gap/prior_kept"] for row in history]
        panel.axhline(100, color="0.85", zorder=0)
        panel.plot(gain, kept, color="0.6", linewidth=1)
        steps = [row["step"] for row in history]
        dots = panel.scatter(gain, kept, c=steps, cmap="viridis", vmin=0, vmax=most, s=22, zorder=2)
        panel.set_title(f"{name}, {steps[-1]:.0f} steps", fontsize=10)
        panel.set_xlabel("control gained (%)")
    axes[0].set_ylabel("prior kept (%)")
    figure.colorbar(dots, ax=list(axes), label="optimiser step", fraction=0.02)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def show(histories: dict[str, list[dict[str, float]]]) -> None:
    """Print the costs of the start, and where each arm ends."""
    start = next(iter(histories.values()))[0]
    for name in ("base", "clean_first", "yarn"):
        print(f"step 0, {name:<12} {start[f'gap/step0_{name}']:>+9.4f}")
    print(f"{'arm':<14} {'steps':>6} {'prior':>8} {'kept':>7} {'true':>8} {'shuffled':>9} {'gain':>7}")
    for name, history in histories.items():
        row = history[-1]
        left = f"{name:<14} {row['step']:>6.0f} {row['gap/prior_loss']:>8.4f} {row['gap/prior_kept']:>7.1%}"
        right = f"{row['gap/control_true']:>8.4f} {row['gap/control_shuffled']:>9.4f}"
        print(f"{left} {right} {row['gap/control_gain']:>7.1%}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", help="folder for everything")
    add(
        "--seconds", type=int, nargs=3, default=[120, 600, 200], help="to fit autoencoder, prior and each arm"
    )
    add("--steps", type=int, default=-1, help="most optimiser steps of each arm; -1 for no end")
    add("--plain", type=float, nargs=2, default=[10, 6.0], help="scenes and minutes of plain video")
    add("--actions", type=float, nargs=2, default=[3, 3.0], help="scenes and minutes with actions")
    add("--size", type=int, nargs=2, default=[64, 96])
    add("--frames", type=int, default=33)
    add("--stride", type=float, default=0.5, help="seconds between windows")
    add("--batch", type=int, default=8)
    add("--prior_lr", type=float, default=3e-3)
    add("--lr", type=float, default=1e-3, help="of every arm")
    add("--control_steps", type=int, default=100)
    add("--share", type=float, default=0.25)
    add("--rank", type=int, default=16)
    add("--rope_factor", type=float, default=1.0, help="YaRN factor of the arms; the prior has 1")
    add("--every", type=int, default=40, help="steps between measurements and checkpoints")
    add("--clips", type=int, default=16, help="held-out clips of each set that are measured")
    add("--workers", type=int, default=2, help="processes that render and decode")
    add("--arms", nargs="+", choices=ARMS, help="only these, the others being fitted elsewhere")
    add("--vae", help="weights of a fitted autoencoder; by default one is fitted")
    add("--channels", type=int, default=8, help="latent channels of the autoencoder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
