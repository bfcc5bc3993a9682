"""Pictures of an evaluation: truth and every world, a row each, at a few moments of the cases that are named;
or, if the file is to be a .webp, a moving picture: truth and worlds side by side, a row for each case.

relic evaluate worlds/compressed --beside worlds/window_8 --out runs/evaluation
python benchmarks/contact_sheet.py runs/evaluation sheet.jpg look_away-10s-0-scene-0 turn_round-20s-0-scene-0
python benchmarks/contact_sheet.py runs/evaluation clip.webp look_away-10s-0-scene-0 --worlds truth compressed
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

from relic.suite.run import video_path

GAP = 12  # pixels between cases
THINNED = 2  # of a moving picture, every second frame is kept


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def at_moments(frames: list[np.ndarray], *, moments: int) -> np.ndarray:
    """Return frames side by side, from the first to the last: (h, moments · w, 3)."""
    places = np.linspace(0, len(frames) - 1, moments).round().astype(int)
    return np.concatenate([frames[place] for place in places], axis=1)


def stacked(rows: list[np.ndarray]) -> np.ndarray:
    """Return pictures of equal width under each other, with gaps."""
    gap = np.full((GAP, rows[0].shape[1], 3), 255, dtype=np.uint8)
    return np.concatenate([part for row in rows for part in (gap, row)][1:])


def scaled(picture: np.ndarray, *, width: int) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((width, image.height * width // image.width), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of relic evaluate")
    parser.add_argument("out", help="the picture")
    parser.add_argument("cases", nargs="+", help="names of videos, without .mp4")
    parser.add_argument("--worlds", nargs="+", help="rows, in this order; by default truth and all worlds")
    parser.add_argument("--moments", type=int, default=9)
    parser.add_argument("--width", type=int, default=1152, help="of the picture")
    parser.add_argument("--fps", type=float, default=16.0, help="of the videos")
    args = parser.parse_args()
    run = Path(args.run)
    contestants = json.loads((run / "report.json").read_text())["contestants"]
    every = ["truth", *(contestant["label"] for contestant in contestants)]
    worlds = args.worlds or every
    known = sorted(path.stem for path in (run / "videos" / "truth").glob("*.mp4"))
    for what, names, among in (("world", worlds, every), ("case", args.cases, known)):
        if unknown := [name for name in names if name not in among]:
            parser.error(f"{unknown[0]} is no {what} of {run}; known are {', '.join(among)}.")
    shown = [[frames_of(video_path(run, world, case)) for world in worlds] for case in args.cases]
    if Path(args.out).suffix == ".webp":
        count = min(len(frames) for row in shown for frames in row)
        beside = [
            stacked([np.concatenate([frames[i] for frames in row], axis=1) for row in shown])
            for i in range(0, count, THINNED)
        ]
        first, *rest = [scaled(picture, width=args.width) for picture in beside]
        lasting = round(1000 * THINNED / args.fps)
        first.save(
            args.out, save_all=True, append_images=rest, duration=lasting, loop=0, quality=55, method=6
        )
    else:
        sheets = [
            np.concatenate([at_moments(frames, moments=args.moments) for frames in row]) for row in shown
        ]
        scaled(stacked(sheets), width=args.width).save(args.out, quality=88)
    print(f"Wrote {args.out}, of each case: {', '.join(worlds)}")


if __name__ == "__main__":
    main()
