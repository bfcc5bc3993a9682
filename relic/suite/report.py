"""`report.json` and `report.html`: what a run measured, with what, and what it could not measure."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from relic.suite.page import write_page
from relic.suite.play import Contestant
from relic.suite.run import TRUTH
from relic.suite.summary import DRAWS, LEVEL, differences, summarise

__all__ = ["build_report", "write_report"]

FORMAT: Final = "relic-evaluation/1"
DIGITS: Final = 8  # of what is written


def build_report(
    records: Sequence[Mapping[str, Any]],
    contestants: Sequence[Contestant],
    *,
    title: str,
    rule: str,
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
    not_measured: Sequence[str] = (),
    vbench: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Return the report as plain JSON values; a score that has nothing to be taken of is None.

    Args:
        records: Of `relic.suite.run.run`, the truth's among them.
        contestants: Whom they are of.
        title: Heading of the page.
        rule: What counts as a revisit, in words.
        settings: What was asked for.
        machine: What it ran on.
        not_measured: What is missing, and how to get it.
        vbench: By label, the mean of each VBench dimension.
    """
    scored = [row for row in records if "scores" in row]
    played = Counter(row["case"] for row in scored)
    players = len({row["contestant"] for row in scored})  # one may be too short for all of them
    common = [
        row for row in scored if played[row["case"]] == players
    ]  # means over other cases differ by these
    skipped = {(row["case"], row["contestant"], row["skipped"]): row for row in records if "skipped" in row}
    labels = [TRUTH, *(contestant.label for contestant in contestants)]
    summary = {label: summarise(r for r in common if r["contestant"] == label) for label in labels}
    for label, dimensions in (vbench or {}).items():
        for name, value in dimensions.items():  # one number of all videos: no interval
            row = {"mean": value, "low": value, "high": value, "cases": None}
            summary[label].setdefault("all", {})[f"vbench/{name}"] = row
    return _finite(
        {
            "format": FORMAT,
            "title": title,
            "suite": settings.get("suite"),
            "settings": dict(settings),
            "rule": rule,
            "machine": dict(machine),
            "intervals": f"{LEVEL:.0%}, percentile bootstrap over scenes, {DRAWS} draws",
            "not_measured": list(not_measured),
            "contestants": [
                {
                    "label": c.label, "policy": str(c.world.config.policy), "d_bar": c.world.d_bar,
                    "student": c.world.name, "sampler": str(c.world.config.sampler),
                }
                for c in contestants
            ],
            "cases_scored": len({row["case"] for row in common}),
            "cases_of_some": len(played) - len({row["case"] for row in common}),
            "summary": summary,
            "differences": {
                label: differences(
                    (r for r in scored if r["contestant"] == label),
                    (r for r in scored if r["contestant"] == labels[1]),
                )
                for label in labels[2:]
            },
            "skipped": [dict(row) for row in skipped.values() if row["contestant"] != TRUTH],
            "cases": [dict(row) for row in scored],
        }
    )  # fmt: skip


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json` and `report.html`, with the videos of one case a group, into a run's folder."""
    first: dict[str, str] = {}
    for row in report["cases"]:
        if row["contestant"] != TRUTH:
            first.setdefault(row["group"], row["case"])
    temporary = out / f".report.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
        temporary.replace(out / "report.json")
    finally:
        temporary.unlink(missing_ok=True)
    write_page(out / "report.html", report, root=out, shown=list(first.values()))


def _finite(value: Any) -> Any:
    """Return plain JSON values, rounded, None for what is not a finite number."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
