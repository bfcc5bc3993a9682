"""`relic report`: truth beside samples of a fitted teacher, with the scores of doing nothing clever."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from relic.callbacks.panel import side_by_side
from relic.data import read_clips
from relic.modules import TeacherExtension
from relic.ops.video import psnr
from relic.suite.page import STYLE, image
from relic.types import Clip

__all__ = ["report"]


class Scores(NamedTuple):
    """Mean PSNR in dB over clips: over the whole clip (without its first frame) and over its second half."""

    whole: float
    second_half: float


def report(
    teacher: str,
    *,
    vae: str,
    clips: str,
    out: str = "report.html",
    split: Literal["train", "validation"] = "train",
    num_clips: int = 6,
    validation_scenes: int = 2,
    evaluation_scenes: int = 2,
    seed: int = 0,
) -> None:
    """Sample clips from their first frames with a fitted teacher and write a self-contained HTML report.

    Args:
        teacher: Exported teacher (safetensors).
        vae: Exported autoencoder (safetensors).
        clips: Rendered data set.
        out: The report.
        split: Scenes that were trained on, or held out.
        num_clips: Number of clips.
        validation_scenes: As many as were held out for validation in training.
        evaluation_scenes: As many as were held out for evaluation in training.
        seed: Seed of the choice of clips and of the noise.
    """
    module = TeacherExtension.from_file(teacher, vae=vae)
    shape = module.clip
    where = {
        "validation_scenes": validation_scenes, "evaluation_scenes": evaluation_scenes,
        "num_frames": shape.max_frames, "clip": shape,
    }  # fmt: skip
    shown = read_clips(clips, split=split, num_clips=num_clips, seed=seed, **where)  # type: ignore[arg-type]
    known = read_clips(clips, split="train", num_clips=24, seed=seed + 1, **where)  # type: ignore[arg-type]
    samples = module.generate(shown, seed=seed)
    mean = torch.stack([clip.video.float().mean(0) for clip in known]).mean(0).round().to(torch.uint8)
    rows = {
        "samples": score(shown, samples),
        "autoencoder alone (the ceiling)": score(shown, module.reconstruct(shown)),
        "first frame, repeated": score(shown, [clip.video[:1].expand_as(clip.video) for clip in shown]),
        "mean picture of the training set": score(shown, [mean.expand_as(clip.video) for clip in shown]),
    }
    facts = {
        "resolution": f"{shape.height}x{shape.width}, {shape.max_frames} frames at {shape.fps} a second",
        "scenes": f"{len({clip.provenance['scene'] for clip in shown})} of the {split} split",
        "clips": str(len(shown)),
        "steps": f"{module.sampler.steps} Euler steps",
    }
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(f"\n{'PSNR, dB':<34}{'clip':>8}{'second half':>14}")
    for name, scores in rows.items():
        print(f"{name:<34}{scores.whole:>8.2f}{scores.second_half:>14.2f}")
    write_html(Path(out), facts, rows, shown, samples, curves([Path(vae).parent, Path(teacher).parent]))
    print(f"\nWrote {out}")


def score(clips: Sequence[Clip], videos: Sequence[Tensor]) -> Scores:
    """Return the mean PSNR of videos against clips; frame 0 is given, so it is left out."""
    per_frame = [psnr(video, clip.video) for video, clip in zip(videos, clips, strict=True)]
    whole = torch.stack([p[1:].mean() for p in per_frame]).mean()
    half = torch.stack([p[len(p) // 2 :].mean() for p in per_frame]).mean()
    return Scores(float(whole), float(half))


def curves(runs: Sequence[Path]) -> bytes | None:
    """Draw the losses logged below the folders of runs as PNG; None if there are no logs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    logs = {(run, path.parent) for run in dict.fromkeys(runs) for path in run.rglob("events.out.tfevents.*")}
    for run, folder in sorted(logs):
        events = EventAccumulator(str(folder))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith(("train/loss", "val/loss_flow", "val/psnr")) and "sigma" not in tag:
                stage = run.resolve().name
                found.setdefault(f"{stage}: {tag}", {}).update({e.step: e.value for e in events.Scalars(tag)})
    if not found:
        return None
    columns = 3
    height = -(-len(found) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(12, 2.6 * height), squeeze=False)
    for axis, (name, points) in zip(axes.flat, found.items(), strict=False):
        axis.plot(*zip(*sorted(points.items()), strict=True), color="#b5402a")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        print(f"{name}: {points[min(points)]:.4f} -> {points[max(points)]:.4f}")
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def write_html(
    out: Path,
    facts: dict[str, str],
    rows: dict[str, Scores],
    clips: Sequence[Clip],
    samples: Sequence[Tensor],
    losses: bytes | None,
) -> None:
    """Write the report, pictures inside."""
    cells = "".join(
        f"<tr><td>{name}</td><td>{s.whole:.2f}</td><td>{s.second_half:.2f}</td></tr>"
        for name, s in rows.items()
    )
    items = "".join(f"<li>{name}: {value}</li>" for name, value in facts.items())
    figures = "".join(
        f"<figure>{image(animation(side_by_side(c.video, v, c.c2w), fps=c.fps), 'webp')}"
        f"{image(strip(c.video, v), 'png')}<figcaption>{c.provenance['scene']}: {', '.join(c.captions[:1])}"
        "</figcaption></figure>"
        for c, v in zip(clips, samples, strict=True)
    )
    curve = f"<h2>Losses</h2>{image(losses, 'png')}" if losses else ""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        PAGE.format(style=STYLE, facts=items, cells=cells, figures=figures, curve=curve), encoding="utf-8"
    )


def animation(video: Tensor, *, fps: float) -> bytes:
    """Encode uint8 (f, h, w, 3) as an animated WebP, which every browser plays."""
    pictures = [Image.fromarray(frame.numpy()) for frame in video]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
        quality=90,
    )
    return buffer.getvalue()


def strip(truth: Tensor, sample: Tensor, *, pictures: int = 6) -> bytes:
    """Lay evenly spaced frames side by side, truth above sample, as PNG."""
    chosen = torch.linspace(0, len(truth) - 1, pictures).round().long()
    rows = [torch.cat(list(video[chosen]), dim=1) for video in (truth, sample)]
    buffer = io.BytesIO()
    Image.fromarray(torch.cat(rows, dim=0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>relic: truth beside samples</title>
<style>{style}</style>
<h1>Truth beside samples</h1>
<p>Each clip is generated from its first frame, its caption and its camera actions. Left the truth, middle the
sample, right the camera's path from above. Below it, frames of the truth (upper row) and of the sample (lower
row).</p> <ul>{facts}</ul>
<table><tr><th>PSNR, dB</th><th>clip</th><th>second half</th></tr>{cells}</table>
{figures}{curve}
</html>
"""
