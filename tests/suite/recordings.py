"""Small folders in the layouts of other benchmarks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from relic.data.video import encode_video
from relic.ops.actions import integrate, parse_script
from relic.suite.recordings import Shape

SHAPE = Shape(size=(32, 48), fps=16, block_frames=8, most_frames=41, d_bar=0.02)


def moving(frames: int, *, height: int = 36, width: int = 64) -> np.ndarray:
    """A smooth picture that moves to the left, uint8 (f, h, w, 3)."""
    x = np.arange(width)[None, :] + np.arange(frames)[:, None]
    wave = 128 + 100 * np.sin(x / 6.0)
    tall = np.linspace(0.3, 1, height)[None, :, None] * wave[:, None, :]
    return np.stack([tall, tall[:, ::-1], 255 - tall], -1).clip(0, 255).astype(np.uint8)


def write_mind(
    root: Path, *, name: str = "data-26", frames: int = 60, mark: int = 20, third: bool = False
) -> Path:
    """Write a clip whose actor walks forward at 2 cm a frame and turns right by 1 degree a frame; return
    it.
    """
    place = "3rd_data" if third else "1st_data"
    folder = root / place / "test" / "mem_test" / name
    folder.mkdir(parents=True)
    rows = []
    x = y = 0.0
    for time in range(frames):
        yaw = float(time)
        rows.append(
            {
                "time": time,
                "ws": 1,
                "ad": 0,
                "ud": 0,
                "lr": 2 if time else 0,
                "actor_pos": {"x": x, "y": y, "z": 170.0},
                "actor_rpy": {"x": 0.0, "y": 0.0, "z": yaw},
            }
        )
        if third:
            rows[-1]["camera_pos"] = {"x": x - 300.0, "y": y, "z": 250.0}
            rows[-1]["camera_rpy"] = {"x": 0.0, "y": -20.0, "z": yaw}
        x, y = x + 2 * np.cos(np.radians(yaw)), y + 2 * np.sin(np.radians(yaw))
    card = {"mark_time": mark, "total_time": frames, "caption": "a street", "data": rows}
    (folder / "action.json").write_text(json.dumps(card))
    (folder / "video.mp4").write_bytes(encode_video(moving(frames), fps=24)[0])
    return folder


def write_memobench(root: Path, *, frames: int = 60, track: bool = False) -> tuple[Path, Tensor]:
    """Write a clip and the tables; return its folder and poses."""
    folder = root / "Synthetic_processed" / "Barnyard" / "Barnyard_005"
    (folder / "RGB5").mkdir(parents=True)
    for index, frame in enumerate(moving(frames)):
        Image.fromarray(frame).save(folder / "RGB5" / f"{index:04d}.png")
    c2w = integrate(parse_script(f"dolly_in+pan_right*{frames - 1}"), d_bar=3.0)
    if not track:
        (folder / "5").mkdir()
        np.save(folder / "5" / "poses.npy", c2w.numpy())
        np.save(folder / "5" / "intrinsics.npy", np.tile([50.0, 50.0, 31.5, 17.5], (frames, 1)))
    (root / "sam3_metadata").mkdir()
    _table(
        root / "sam3_metadata" / "synthetic_metadata.csv",
        [{"scene": "Barnyard", "video_id": "5", "subject": "fox", "prompt": "a fox in a yard"}],
    )
    _table(
        root / "Synthetic_processed" / "Synthetic_ExitReenter.csv",
        [{"scene": "Barnyard", "video_id": "Barnyard_005", "exits": "20", "re-enter": "40"}],
    )
    return folder, c2w


def write_track(folder: Path, rows: list[dict[str, float]]) -> None:
    """Write the raw camera track of a MemoBench clip."""
    _table(folder / "camera_full5.csv", rows)


def _table(path: Path, rows: list) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
