"""Pictures of an evaluation: truth and every world, a row each, at a few moments of the cases that are named.

relic evaluate worlds/compressed --beside worlds/window_8 --out runs/evaluation
python benchmarks/contact_sheet.py runs/evaluation sheet.jpg look_away-10s-0-scene-0 turn_round-20s-0-scene-0
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


def frames_of(path: Path, *, moments: int) -> np.ndarray:
    """Return frames of a video side by side, from the first to the last: (h, moments · w, 3)."""
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    places = np.linspace(0, len(frames) - 1, moments).round().astype(int)
    return np.concatenate([frames[place] for place in places], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of relic evaluate")
    parser.add_argument("out", help="the picture")
    parser.add_argument("cases", nargs="+", help="names of videos, without .mp4")
    parser.add_argument("--moments", type=int, default=9)
    parser.add_argument("--width", type=int, default=1152, help="of the picture")
    args = parser.parse_args()
    run = Path(args.run)
    contestants = json.loads((run / "report.json").read_text())["contestants"]
    worlds = ["truth", *(contestant["label"] for contestant in contestants)]
    known = sorted(path.stem for path in (run / "videos" / "truth").glob("*.mp4"))
    for case in args.cases:
        if case not in known:
            parser.error(f"{case} is no case of {run}; known are {', '.join(known)}.")
    rows: list[np.ndarray] = []
    for case in args.cases:
        shown = [frames_of(video_path(run, world, case), moments=args.moments) for world in worlds]
        gap = np.full((GAP, shown[0].shape[1], 3), 255, dtype=np.uint8)
        rows += ([gap] if rows else []) + shown
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((args.width, sheet.height * args.width // sheet.width), Image.Resampling.LANCZOS).save(
        args.out, quality=88
    )
    print(f"Wrote {args.out}; rows of each case: {', '.join(worlds)}")


if __name__ == "__main__":
    main()
