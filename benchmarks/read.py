"""Frames a second of `WorldDataModule`'s training loader against bare PyAV decoding of the same windows.

All read the same windows, in the same batches, with the same number of workers. The bare sides decode plain
mp4 files in their workers and send nothing back: `plain` by `frame.to_ndarray`, `tuned` by one scaler of a
single thread for all frames. Rounds alternate, so that a busy machine slows all sides.

    python benchmarks/read.py --height 128 --width 224 --workers 0 2
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset

from relic.data import WorldDataModule, pack_sample, write_index, write_shard
from relic.data.sampling import Plan
from relic.data.schema import VIDEO
from relic.data.video import ONE_THREAD
from relic.ops.actions import integrate, parse_script
from relic.types import ClipSpec

RECORDINGS, SECONDS, FPS = 8, 30, 16


class BareVideo(Dataset[int]):
    """Decodes the windows of a plan from mp4 files, the shortest way there is."""

    def __init__(self, folder: Path, plan: Plan, *, tuned: bool) -> None:
        self.tuned = tuned
        self.folder = folder
        self.plan = plan

    def __getitem__(self, place: tuple[int, int]) -> int:
        window = self.plan.draw(*place, attempt=0)
        count = 0
        reformatter = VideoReformatter()
        with av.open(str(self.folder / f"{window.row.key}.mp4")) as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.thread_count = 1
            ticks = 1 / (stream.time_base * stream.average_rate)
            container.seek(int(window.start * ticks), stream=stream)
            for frame in container.decode(stream):
                if frame.pts < window.start * ticks:
                    continue
                if self.tuned:
                    frame = reformatter.reformat(frame, format="rgb24", **ONE_THREAD)
                frame.to_ndarray(format="rgb24")
                count += 1
                if count == window.num_frames:
                    break
        return count


def write_world(root: Path, *, height: int, width: int) -> None:
    """Write recordings of a camera gliding over a rough picture, and their mp4 files beside."""
    (root / "mp4").mkdir(parents=True)
    num_frames = SECONDS * FPS + 1
    c2w = integrate(parse_script(f"dolly_in*{num_frames - 1}"))
    intrinsics_px = torch.tensor([width / 2, width / 2, width / 2 - 0.5, height / 2 - 0.5])

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number in range(RECORDINGS):
            frames = glide(num_frames, height=height, width=width, seed=number)
            sample = pack_sample(
                frames=frames, c2w=c2w, intrinsics_px=intrinsics_px, fps=FPS, captions=("a rough picture",),
                provenance={"scene": f"scene{number}"},
            )  # fmt: skip
            (root / "mp4" / f"walk{number}.mp4").write_bytes(sample[VIDEO])
            yield f"walk{number}", sample

    write_shard(root / "shards" / "00000.tar", samples())
    write_index(root)


def glide(num_frames: int, *, height: int, width: int, seed: int) -> Iterator[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    octaves = [
        torch.nn.functional.interpolate(
            torch.rand(1, 3, 2**k, 2**k, generator=generator), size=(2 * height, 2 * width), mode="bicubic"
        )
        for k in range(2, 8)
    ]
    picture = sum(octave[0] / 2**k for k, octave in enumerate(octaves))
    assert isinstance(picture, torch.Tensor)
    pixels = (picture / picture.max() * 255).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    for frame in range(num_frames):
        row = int((1 + np.sin(frame / 40)) / 2 * (height - 1))
        column = int((1 + np.cos(frame / 55)) / 2 * (width - 1))
        yield pixels[row : row + height, column : column + width]


def timed(batches: Iterator[Any], frames: int) -> float:
    """Return frames a second of a running loader, its first batch left out."""
    next(batches)
    start = time.perf_counter()
    rest = sum(1 for _ in batches)
    return frames * rest / (time.perf_counter() - start)


def compare(root: Path, *, spec: ClipSpec, workers: int, batch: int, batches: int, rounds: int) -> None:
    data = WorldDataModule(
        root=str(root), clip=spec, global_batch=batch, batches_per_epoch=batches, workers=workers,
        validation_scenes=0, evaluation_scenes=0,
    )  # fmt: skip
    data.setup("fit")
    ours = data.train_dataloader()
    plan = ours._loader.dataset.plan  # type: ignore[attr-defined]
    frames = batch * spec.max_frames
    speeds: dict[str, list[float]] = {"ours": [], "plain": [], "tuned": []}
    for number in range(rounds):
        places = [[(number * batches + b, place) for place in range(batch)] for b in range(batches)]
        sides: dict[str, Any] = {"ours": ours}
        for name in ("plain", "tuned"):
            bare = BareVideo(root / "mp4", plan, tuned=name == "tuned")
            sides[name] = DataLoader(bare, batch_sampler=places, num_workers=workers)
        order = list(sides)[:: 1 if number % 2 else -1]
        for name in order:
            speeds[name].append(timed(iter(sides[name]), frames))
    print(f"{workers} workers: {statistics.median(speeds['ours']):.0f} frames/s")
    for name in ("plain", "tuned"):
        ratios = [a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)]
        print(
            f"  bare PyAV, {name}: {statistics.median(speeds[name]):.0f} frames/s, ratio median "
            f"{statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--frames", type=int, default=81, help="frames of a window")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=10, help="batches a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    settings = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, av {av.__version__}")
    print(f"windows of {settings.frames} x {settings.height} x {settings.width}, batches of {settings.batch}")
    spec = ClipSpec(height=settings.height, width=settings.width, fps=FPS, horizons=(settings.frames,))
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), height=settings.height, width=settings.width)
        for workers in settings.workers:
            compare(
                Path(folder), spec=spec, workers=workers, batch=settings.batch, batches=settings.batches,
                rounds=settings.rounds,
            )  # fmt: skip


if __name__ == "__main__":
    main()
