"""Does self-forcing help? Rollouts of students along held-out paths, beside truth and what else there is.

Every clip starts from one true frame and follows the true actions. Rows, each the mean over clips and, for
students, over seeds with the spread of the seeds: self-forced students, the same before self-forcing, their
teacher with as few steps and with its own, the first frame repeated, and truth through the autoencoder.
Frame 0 is given and left out. Colour drift is the distance of mean colours of the last second from truth's,
in grey levels, mean over channels; sharpness is 1 if as sharp as truth.

    python benchmarks/student.py runs/world --clips 16 --lpips alexnet.pth
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from PIL import Image
from torch import Tensor

from relic.data import read_clips
from relic.metrics import LPIPSUnavailable, load_lpips, psnr, sharpness
from relic.modules import TeacherExtension
from relic.nn.checkpoints import WeightsSource, load_weights, read_header
from relic.nn.denoiser import EulerSampler
from relic.nn.memory import Memory
from relic.nn.student import StudentConfig
from relic.nn.tiny_vae import TinyVAE
from relic.ops.actions import encode_actions
from relic.ops.randomness import clip_key
from relic.ops.video import from_uint8, to_uint8
from relic.ops.words import word_ids
from relic.rollout import KeyedNoise, Rollout
from relic.types import TIME_STRIDE, Clip

SHOWN_SECONDS = (0, 1, 2, 4, 7, 10, 13, 16, 20)
Scores = dict[str, float]


def score(clips: Sequence[Clip], videos: Sequence[Tensor], *, lpips: Any) -> Scores:
    """Return the mean scores of videos against clips."""
    rows = []
    for clip, video in zip(clips, videos, strict=True):
        truth, made = clip.video[1:], video[1:]
        last = round(clip.fps)
        colours = [each[-last:].float().mean((0, 1, 2)) for each in (made, truth)]
        row = {
            "psnr": float(psnr(made, truth).mean()),
            "psnr_last": float(psnr(made[-last:], truth[-last:]).mean()),
            "sharpness": float(sharpness(made).mean() / sharpness(truth).mean()),
            "colour_drift": float((colours[0] - colours[1]).abs().mean()),
        }
        if lpips is not None:
            device = next(lpips.buffers()).device
            row["lpips"] = float(lpips(made.to(device), truth.to(device)).mean())
        rows.append(row)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@torch.no_grad()
def roll_out(path: str, clips: Sequence[Clip], *, vae: TinyVAE, device: torch.device) -> Sequence[Tensor]:
    """Return what a student makes of the first frames and actions of clips, all of them at once."""
    config = StudentConfig.from_header(read_header(path, kind="student")["config"])
    net = config.build()
    load_weights(net, WeightsSource(path=path), kind="student", device=device)
    net.to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
        noise = KeyedNoise(tuple(clip_key(clip, seed=0) for clip in clips), ("generate",))
        memory = Memory(config.plan(), batch=len(clips), dtype=dtype, device=device)
        rollout = Rollout(net, memory, noise=noise, sampler=config.sampler)
        actions = (
            torch.stack([encode_actions(clip.c2w, d_bar=clip.d_bar) for clip in clips]).float().to(device)
        )
        captions = [clip.captions[0] if clip.captions else "" for clip in clips]
        text = torch.stack([word_ids(each, length=config.net.text_length) for each in captions]).to(device)
        first = torch.stack([clip.video[:1] for clip in clips]).movedim(-1, 2).to(device)
        image = vae.encode(from_uint8(first))
        rollout.prefill(image, actions[:, :1], text=text)
        stretches = actions[:, 1:].split(TIME_STRIDE * config.clip.block_latents, dim=1)
        latents = torch.cat([image, *(block.latents for block in rollout(stretches, text=text))], dim=1)
        return [to_uint8(vae.decode(each[None])).cpu()[0] for each in latents]


def sheet(rows: dict[str, Sequence[Tensor]], *, clip: int, fps: float) -> Image.Image:
    """Return pictures of a clip at a few moments, a row of them for each way of making it."""
    lines = []
    for videos in rows.values():
        video = videos[clip]
        moments = [min(round(second * fps), len(video) - 1) for second in SHOWN_SECONDS]
        lines.append(np.concatenate([video[moment].numpy() for moment in moments], axis=1))
    return Image.fromarray(np.concatenate(lines, axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world", help="folder of benchmarks/world.py")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=321)
    parser.add_argument("--held", type=int, nargs=2, default=[8, 64], help="as in benchmarks/world.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arm", default="compressed", help="as in benchmarks/world.py")
    parser.add_argument(
        "--lpips", help="weights of AlexNet's convolutions; by default those in torch's cache"
    )
    parser.add_argument("--out", help="folder of scores.json and pictures; by default in the world's")
    args = parser.parse_args()
    root, device = Path(args.world), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(args.out or root / "scores")
    out.mkdir(parents=True, exist_ok=True)
    print(describe_machine(), flush=True)
    try:
        lpips = load_lpips(args.lpips, device=device)
    except LPIPSUnavailable as error:
        print(f"LPIPS is left out: {error}")
        lpips = None
    clips = read_clips(
        root / "clips", split="evaluation", num_clips=args.clips, num_frames=args.frames, seed=0,
        validation_scenes=args.held[0], evaluation_scenes=args.held[1],
    )  # fmt: skip
    vae = str(root / "autoencoder" / "tiny_vae.safetensors")
    shown: dict[str, Sequence[Tensor]] = {"truth": [clip.video for clip in clips]}
    table: dict[str, list[Scores]] = {}

    def add(name: str, videos: Sequence[Tensor], *, seconds: float = 0.0) -> None:
        table.setdefault(name, []).append(score(clips, videos, lpips=lpips))
        shown.setdefault(name, videos)  # of the first seed
        values = "  ".join(f"{key} {value:.4f}" for key, value in table[name][-1].items())
        print(f"{name:<28} {values}  ({seconds:.0f} s)", flush=True)
        report = {"machine": describe_machine(), "settings": vars(args), "scores": table}
        (out / "scores.json").write_text(json.dumps(report, indent=1))

    codec = TinyVAE.from_file(vae).to(device)
    with torch.no_grad():
        add("first frame repeated", [clip.video[:1].expand_as(clip.video) for clip in clips])
        videos = [clip.video[None].movedim(-1, 2).to(device) for clip in clips]
        through = [to_uint8(codec.decode(codec.encode(from_uint8(video))))[0].cpu() for video in videos]
        add("autoencoder (ceiling)", through)
    for name, folder in (("self-forced", "self_forcing_20s"), ("before self-forcing", "causal_init")):
        for seed in range(args.seeds):
            start = time.monotonic()
            path = str(root / f"{folder}_{args.arm}_seed{seed}" / "student.safetensors")
            videos = roll_out(path, clips, vae=codec, device=device)
            add(name, videos, seconds=time.monotonic() - start)
    own_teacher = root / f"teacher_20s_{args.arm}"  # of an arm with another network
    folder = own_teacher if own_teacher.exists() else root / "teacher_20s"
    teacher = str(folder / "teacher.safetensors")
    own = TeacherExtension.from_file(teacher, vae=vae).sampler
    for steps in (4, own.steps):
        start = time.monotonic()
        sampler = EulerSampler(steps=steps, shift=own.shift, guidance=own.guidance)
        module = TeacherExtension.from_file(teacher, vae=vae, sampler=sampler)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            videos = module.to(device).generate(clips, seed=0)
        add(f"teacher, {steps} steps", videos, seconds=time.monotonic() - start)
    for clip in range(min(4, args.clips)):
        sheet(shown, clip=clip, fps=clips[clip].fps).save(out / f"clip_{clip}.jpg", quality=88)
    print("rows of the pictures: " + ", ".join(shown))
    print(f"\n{'':<28}" + "".join(f"{name:>16}" for name in next(iter(table.values()))[0]))
    for name, runs in table.items():
        cells = []
        for key in runs[0]:
            values = np.array([run[key] for run in runs])
            spread = f" ±{values.std():.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        print(f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
