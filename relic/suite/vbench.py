"""VBench's six dimensions for any video, by the user's own `vbench` in a subprocess: MP4s in, JSON out.

Written against the command line of VBench 0.1 (`vbench evaluate --mode=custom_input`) and its result files.
It was not run here: its networks are downloaded by VBench itself and take a GPU. Install it apart (`pip
install vbench`), in an environment of its own, and name its command.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["DIMENSIONS", "VBenchUnavailable", "read_results", "run_vbench"]

DIMENSIONS: Final = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
RESULTS: Final = "*_eval_results.json"
TAIL: Final = 2000  # characters of what it said, in an error


class VBenchUnavailable(FileNotFoundError):
    """There is no `vbench` to run. Catch it to write its text into a report."""


def run_vbench(
    videos: str | Path, *, command: Sequence[str] = ("vbench",), dimensions: Sequence[str] = DIMENSIONS
) -> dict[str, float]:
    """Score all MP4s of a folder -> the mean of each dimension, as VBench gives it.

    A run a dimension, because its command line takes one. It ends with 0 even where it failed, so what
    counts is whether a result was written.

    Args:
        videos: Folder of MP4s, nothing else in it.
        command: How `vbench` is started, e.g. ("/envs/vbench/bin/vbench",).
        dimensions: Which of `DIMENSIONS`.

    Raises:
        VBenchUnavailable: If the command is not found.
        ValueError: If there is no video, a dimension takes no custom video, or a path holds a blank
            (VBench's own command passes paths through a shell).
        RuntimeError: If no result was written; it ends with what VBench said.
    """
    folder = Path(videos).resolve()
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown:
        raise ValueError(
            f"dimensions: {', '.join(unknown)} is not among those for any video, {', '.join(DIMENSIONS)}."
        )
    if not any(folder.glob("*.mp4")):
        raise ValueError(f"{folder} holds no .mp4 to score.")
    if any(c.isspace() for c in str(folder)):
        raise ValueError(
            f"{str(folder)!r} holds a blank, which VBench's command line can't take; move the folder."
        )
    if shutil.which(command[0]) is None:
        raise VBenchUnavailable(
            f"VBench: not measured, {command[0]!r} was not found; pip install vbench in an environment of "
            "its own and name its command."
        )
    scores = {}
    for dimension in dimensions:
        with tempfile.TemporaryDirectory(prefix="vbench-") as out:
            words = [*command, "evaluate", "--videos_path", str(folder), "--dimension", dimension]
            words += ["--mode=custom_input", "--output_path", out]
            done = subprocess.run(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            found = sorted(Path(out).glob(RESULTS))
            if done.returncode or not found:
                raise RuntimeError(
                    f"VBench gave no result for {dimension} (exit code {done.returncode}): "
                    f"...{done.stdout[-TAIL:].strip()}"
                )
            scores[dimension] = read_results(found[-1])[dimension]
    return scores


def read_results(path: str | Path) -> dict[str, float]:
    """Read a result file of VBench: dimension -> mean over videos.

    Raises:
        ValueError: If it is none, or a mean is not a finite number.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        scores = {str(name): float(value[0]) for name, value in found.items()}
    except (json.JSONDecodeError, AttributeError, TypeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a result of VBench ({error}); it must map each dimension to [mean, [one entry a "
            "video]]."
        ) from error
    odd = [name for name, value in scores.items() if not math.isfinite(value)]
    if odd:
        raise ValueError(f"{path}: {', '.join(odd)} is not a finite number.")
    return scores
