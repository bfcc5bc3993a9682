"""How fast does `relic render` make finished shards? Frames a second by renderer, everything counted.

The time is that of the whole command: scenes, paths, pictures, anti-aliasing, h264, tars, index, and the
start of the worker processes.

    python benchmarks/render.py --size 128 256 --minutes 24 --workers 2
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine

from relic.data.index import Index
from relic.engine import choose_backend

BACKENDS = ("egl", "software")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256])
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=24.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    print(describe_machine())
    height, width = args.size
    print(f"{height}x{width}, {args.scenes} scenes, {args.minutes:g} minutes, {args.workers} workers")
    for number in range(args.rounds):  # alternating, so that a busy machine slows both
        for backend in BACKENDS:
            try:
                choose_backend(backend)
            except ValueError as error:
                print(f"{backend:<9} left out: {error}")
                continue
            frames, seconds = timed(args, backend=backend)
            speed = f"{frames} frames in {seconds:.1f} s, {frames / seconds:.0f} frames/s"
            print(f"{backend:<9} round {number}: {speed}", flush=True)


def timed(args: argparse.Namespace, *, backend: str) -> tuple[int, float]:
    """Render a set with the command line -> frames in its index, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--out", folder, "--scenes", args.scenes, "--minutes", args.minutes, "--size", *args.size]
        words += ["--workers", args.workers, "--backend", backend, "--seed", 0]
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "relic.cli", "render", *map(str, words)], check=True, capture_output=True
        )
        seconds = time.monotonic() - start
        return sum(row.num_frames for row in Index.open(Path(folder)).rows), seconds


if __name__ == "__main__":
    main()
