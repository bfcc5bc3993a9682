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


def bootstrap(values: Sequence[float], *, places: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """Return the mean of values and its 95 % percentile interval over resampled places; NaNs are left out.

    Cases of one place (a scene) are drawn together, since what is hard there is hard for all of them. The
    same for equal arguments. Of one place both ends are the mean: it says nothing of others.
    places: where each value was measured; None for a place of its own each.
    """
    where = list(map(str, range(len(values)))) if places is None else places
    found: dict[str, list[float]] = {}
    for value, place in zip(values, where, strict=True):
        if not math.isnan(value):
            found.setdefault(place, []).append(value)
    if not found:
        return Interval(math.nan, math.nan, math.nan, 0)
    sums = torch.tensor([sum(each) for each in found.values()], dtype=torch.float64)
    counts = torch.tensor([len(each) for each in found.values()], dtype=torch.float64)
    draws = torch.randint(len(sums), (DRAWS, len(sums)), generator=keyed_generator("bootstrap", seed))
    tail = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(sums[draws].sum(1) / counts[draws].sum(1), tail).tolist()
    return Interval(float(sums.sum() / counts.sum()), low, high, int(counts.sum()))


def place_of(record: Mapping[str, Any]) -> str:
    """Return where a case was played: its scene, or the clip itself."""
    return str((record.get("provenance") or {}).get("scene", record["case"]))


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Summarise the scored cases of one contestant, over all of them and by group and length.

    records: each with `group`, `seconds` and `scores`, a number or None by name.

    Returns:
        For "all", "group: pan", "seconds: 5", ...: by score its mean, low, high and cases; counts are sums.
    """
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        for part in ("all", f"group: {record['group']}", f"seconds: {record['seconds']:g}"):
            parts.setdefault(part, []).append(record)
    return {part: _summary(rows) for part, rows in parts.items()}


def _summary(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    rows, places = [record["scores"] for record in records], [place_of(record) for record in records]
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [math.nan if row.get(name) is None else float(row[name]) for row in rows]
        if name in COUNTS:
            found[name] = {"sum": sum(int(value) for value in values if not math.isnan(value))}
        else:
            found[name] = bootstrap(values, places=places)._asdict()
    return found


def differences(
    records: Iterable[Mapping[str, Any]], base: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return how much higher one contestant scores than another on the cases that both have, by score.

    Differences are taken case by case before they are averaged, so that what is hard for both cancels: an
    interval that leaves out 0 tells two contestants apart where their own intervals overlap.
    """
    theirs = {record["case"]: record["scores"] for record in base}
    paired = [record for record in records if record["case"] in theirs]
    pairs = [(record["scores"], theirs[record["case"]]) for record in paired]
    found = {}
    for name in dict.fromkeys(name for ours, _ in pairs for name in ours):
        both = [(ours.get(name), other.get(name)) for ours, other in pairs]
        apart = [math.nan if a is None or b is None else a - b for a, b in both]
        interval = bootstrap(apart, places=[place_of(record) for record in paired])
        if interval.cases and name not in COUNTS:
            found[name] = interval._asdict()
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
