"""`relic demo`: walk through the shipped world; then render one, fit autoencoder and teacher, see samples."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

from relic.cli import find_config

__all__ = ["demo"]

TOUR = "pan_right*40 static*8 pan_left*40 dolly_in*24 dolly_out*24 pan_left*32 static*8 pan_right*32"


def demo(*, out: str = "runs/demo", scenes: int = 3, minutes: float = 1.5, seed: int = 0) -> None:
    """Walk through the shipped world; then render, fit and sample a smaller one on this machine, and write a
    report with truth beside samples.

    Every step is a `relic` command that you could type yourself; it is printed before it runs. Stopped, the
    demo goes on where it was when started again.

    Args:
        out: Folder for everything.
        scenes: Scenes rendered; one of them is held out for validation.
        minutes: Minutes of video over all scenes.
        seed: Seed of scenes, weights and noise.
    """
    root, started = Path(out), time.monotonic()
    clips, latents = root / "clips", root / "latents"
    vae, teacher = root / "autoencoder" / "tiny_vae.safetensors", root / "teacher" / "teacher.safetensors"
    video = root / "tiny.mp4"
    if not video.exists():
        run("rollout", "tiny", "--actions", TOUR, "--panel", "true", "--out", video)
    run("render", "--out", clips, "--scenes", scenes, "--minutes", minutes, "--size", 64, 96, "--seed", seed)
    seeds = (f"--model.init_args.seed={seed}", f"--data.seed={seed}")
    fit("configs/autoencoder/demo.yaml", *seeds, data=clips, root=vae.parent, product=vae)
    run(
        "encode",
        clips,
        "--out",
        latents,
        "--vae",
        vae,
        "--horizon",
        33,
        "--stride_seconds",
        0.5,
        "--seed",
        seed,
    )
    fit(
        "configs/teacher/demo.yaml",
        f"--model.init_args.vae={vae}",
        *seeds,
        data=latents,
        root=teacher.parent,
        product=teacher,
    )
    report = ["report", teacher, "--vae", vae, "--clips", clips, "--out", root / "report.html"]
    run(*report, "--validation_scenes", 1, "--evaluation_scenes", 0, "--seed", seed)
    print(
        f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Open {video} and {root / 'report.html'}"
    )


def fit(config: str, *extra: str, data: Path, root: Path, product: Path) -> None:
    """Fit one stage, from its last checkpoint if it was stopped, unless its product is there already."""
    if product.exists():
        print(f"\n{product} is there already.")
        return
    words = [
        "--config",
        find_config(config),
        f"--data.root={data}",
        f"--trainer.default_root_dir={root}",
        *extra,
    ]
    if (root / "checkpoints" / "last.ckpt").exists():
        words += ["--ckpt_path", "last"]
    run("fit", *words)


def run(*words: object) -> None:
    """Run a relic command in its own process, showing it first; stop with its exit status if it fails."""
    command = [str(word) for word in words]
    print(f"\n$ relic {shlex.join(command)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "relic.cli", *command], check=False).returncode
    if status:
        sys.exit(
            f"relic demo: `relic {command[0]}` failed (exit status {status}); start again to go on from here."
        )
