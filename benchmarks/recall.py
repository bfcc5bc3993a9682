"""What does a teacher remember? There and back: the way out is true, the same way back is its own.

Every clip is flown out and back again. On the way back all has been seen, so each frame's truth is known.
Rows, means over clips, the way back in quarters: the teacher behind the true way out (which takes one that
was fitted with `prefix_share`), the same from the first image alone, the last true frame repeated, and truth
through the autoencoder. The picture has truth and the first two of these for some clips, a row each.

    relic render --out runs/unseen --scenes 12 --minutes 3 --size 128 256 --seed 7919
    python benchmarks/recall.py teacher.safetensors --vae tiny_vae.safetensors --clips runs/unseen
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from relic.data import read_clips
from relic.metrics import psnr
from relic.modules import TeacherExtension
from relic.types import Clip

SHOWN = 3  # clips in the picture
PLACES = 6  # frames of each


def there_and_back(clip: Clip) -> Clip:
    """Return a clip followed by itself reversed, its last frame once."""
    video, path = (torch.cat([x, x.flip(0)[1:]]) for x in (clip.video, clip.c2w))
    return clip._replace(video=video, c2w=path)


def picture(rows: list[Tensor]) -> Image.Image:
    """Lay frames of videos (f, h, w, 3) out, a row each."""
    places = np.linspace(0, len(rows[0]) - 1, PLACES).round().astype(int)
    return Image.fromarray(np.concatenate([np.concatenate(list(video[places]), 1) for video in rows], 0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", help="weights of the teacher (safetensors)")
    parser.add_argument("--vae", required=True, help="weights of its autoencoder (safetensors)")
    parser.add_argument("--clips", required=True, help="folder of recordings that it was not fitted to")
    parser.add_argument("--frames", type=int, default=81, help="of the way out, 4k+1")
    parser.add_argument("--count", type=int, default=8, help="clips")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="recall.png", help="the picture")
    args = parser.parse_args()
    module = TeacherExtension.from_file(args.teacher, vae=args.vae).to(args.device)
    module.sampler = replace(module.sampler, steps=args.steps)
    clips = read_clips(
        args.clips, split="validation", num_clips=args.count, num_frames=args.frames, seed=args.seed,
        validation_scenes=args.count, evaluation_scenes=0,
    )  # fmt: skip
    print(describe_machine())
    back, scores, rows = slice(args.frames, None), dict[str, list[Tensor]](), list[Tensor]()
    for number, clip in enumerate(tqdm([there_and_back(clip) for clip in clips])):
        truth = clip.video[back]
        made = {
            "behind the true way out": module.generate([clip], prefix_frames=args.frames, seed=0)[0][back],
            "from the first image": module.generate([clip], seed=0)[0][back],
            "last true frame repeated": clip.video[args.frames - 1].expand_as(truth),
            "truth through the autoencoder": module.reconstruct([clip])[0][back],
        }
        for name, video in made.items():
            scores.setdefault(name, []).append(psnr(video, truth))
        if number < SHOWN:
            rows += [truth, *list(made.values())[:2]]
    picture(rows).save(Path(args.out))
    print(f"{len(clips)} clips, {args.frames} frames out and as many back, {args.steps} steps; PSNR, dB")
    for name, values in scores.items():
        every = torch.stack(values)
        quarters = "  ".join(f"{float(part.mean()):5.2f}" for part in every.chunk(4, dim=1))
        each = every.mean(1)
        spread = float(each.std(correction=0))
        print(f"{name:<30} {float(each.mean()):5.2f} ± {spread:4.2f} over clips  | {quarters}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
