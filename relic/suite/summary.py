"""Means over cases with bootstrap intervals, and what a figure was measured with."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from relic.ops.randomness import keyed_generator
from relic.suite.score import COUNTS

__all__ = ["Interval", "bootstrap", "differences", "machine", "summarise"]

DRAWS: Final = 2000
LEVEL: Final = 0.95
PACKAGES: Final = (
    "relic-world",
    "torch",
    "torchmetrics",
    "numpy",
    "opencv-python-headless",
    "scipy",
    "av",
    "panda3d",
)


class Interval(NamedTuple):
    """A mean over cases, the ends of its interval, and how many cases it is of."""

    mean: float
    low: float
    high: float
    cases: int


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the mean of values and its 95 % percentile interval over resampled cases; NaNs are left out.

    The same for equal arguments. Of one case both ends are the mean: it says nothing of others.
    """
    known = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    if not len(known):
        return Interval(math.nan, math.nan, math.nan, 0)
    draws = torch.randint(len(known), (DRAWS, len(known)), generator=keyed_generator("bootstrap", seed))
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(
        known[draws].mean(1), torch.tensor([tail, 1 - tail], dtype=torch.float64)
    ).tolist()
    return Interval(float(known.mean()), low, high, len(known))


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Summarise the scored cases of one contestant, over all of them and by group and length.

    records: each with `group`, `seconds` and `scores`, a number or None by name.

    Returns:
        For "all", "group: pan", "seconds: 5", ...: by score its mean, low, high and cases; counts are sums.
    """
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        for part in ("all", f"group: {record['group']}", f"seconds: {record['seconds']:g}"):
            parts.setdefault(part, []).append(record["scores"])
    return {part: _summary(rows) for part, rows in parts.items()}


def _summary(rows: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [math.nan if row.get(name) is None else float(row[name]) for row in rows]  # type: ignore[arg-type]
        if name in COUNTS:
            found[name] = {"sum": sum(int(value) for value in values if not math.isnan(value))}
        else:
            found[name] = bootstrap(values)._asdict()
    return found


def differences(
    records: Iterable[Mapping[str, Any]], base: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return how much higher one contestant scores than another on the cases that both have, by score.

    Differences are taken case by case before they are averaged, so that what is hard for both cancels: an
    interval that leaves out 0 tells two contestants apart where their own intervals overlap.
    """
    theirs = {record["case"]: record["scores"] for record in base}
    pairs = [(r["scores"], theirs[r["case"]]) for r in records if r["case"] in theirs]
    found = {}
    for name in dict.fromkeys(name for ours, _ in pairs for name in ours):
        both = [(ours.get(name), other.get(name)) for ours, other in pairs]
        known = [a - b for a, b in both if a is not None and b is not None]
        if known and name not in COUNTS:
            found[name] = bootstrap(known)._asdict()
    return found


def machine(device: str) -> dict[str, Any]:
    """Return what a run is made on: device, processor, versions, and the commit of a checkout."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(Path(__file__).parents[2]),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit(root: Path) -> str | None:
    """Return the commit that is checked out at `root`, marked if files differ; None if it is no checkout."""
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--match", ""]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
