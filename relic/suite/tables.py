"""The tables of a report: which scores stand in which, and what stands beside them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from relic.suite.vbench import DIMENSIONS

__all__ = ["TABLES", "Column", "Table", "cell", "number", "table_html"]


class Column(NamedTuple):
    """A score as a table shows it."""

    name: str
    title: str
    best: str  # which way is better: up, down, or empty


class Table(NamedTuple):
    """A table over contestants, and which lines stand beside them as floors and ceilings."""

    title: str
    about: str
    columns: tuple[Column, ...]
    beside: tuple[tuple[str, str], ...] = ()


def _motion(mode: str) -> tuple[Column, ...]:
    """Return the columns of estimated motion, of all frames (action) or of those behind a prefix (memory)."""
    titles = {
        "rpe_trans": "RPE translation, Δ 1", "rpe_trans_8": "Δ 8", "rpe_rot_deg": "RPE rotation, ° Δ 1",
        "rpe_rot_deg_8": "Δ 8", "ate": "ATE", "coverage": "coverage", "unscored": "lost",
    }  # fmt: skip
    return tuple(
        Column(f"{mode}/{name}", title, "up" if name == "coverage" else "down")
        for name, title in titles.items()
    )


# one column a line would hide the tables that they make
TABLES: Final = (
    Table(
        "Does it remember? (after a true prefix, against truth)",
        "Frames that show again what the true prefix showed before it left the view, against the true frame.",
        (
            Column("memory/psnr_revisit", "PSNR, dB", "up"), Column("memory/ssim_revisit", "SSIM", "up"),
            Column("memory/lpips_revisit", "LPIPS", "down"),
            Column("memory/sharpness_ratio", "sharpness ratio", ""),
            Column("memory/psnr_revisit_moved",
            "PSNR where it moved", "up"), Column("memory/pairs", "pairs", ""), Column("memory/did_not_move",
            "did not move", "down"),
        ),
        (
            ("_nearest_seen", "the true frame seen before, shown again"),
            ("_copy_first", "floor: first frame, repeated"),
            ("_autoencoder", "ceiling: the truth through the autoencoder"),
        ),
    ),
    Table(
        "Does it obey? (from the image alone)",
        "Motion estimated from the video against the commanded one. The first line is the estimator's own "
        "floor. A case in which the camera is found on less than half of the frames is lost: not scored.",
        _motion("action"),
    ),
    Table(
        "Does it obey where it has been? (after a true prefix)",
        "Motion estimated from the generated frames of the memory cases against the commanded one.",
        _motion("memory"),
    ),
    Table(
        "Does it agree with itself? (from the image alone)",
        "Frames of one pose, before and after the view was left, where the estimated camera left and "
        "returned.",
        (
            Column("memory/psnr_self", "PSNR, dB", "up"), Column("memory/ssim_self", "SSIM", "up"),
            Column("memory/lpips_self", "LPIPS", "down"), Column("memory/pairs_self", "pairs", ""),
            Column("memory/did_not_move_self", "did not move", "down"),
        ),
        (
            ("_away", "floor: the frame that sees least of it"),
            ("_autoencoder", "ceiling: the truth through the autoencoder"),
        ),
    ),
    Table(
        "Frame by frame after the prefix (MIND's long-context memory), and Echo's loop closure",
        "Every generated frame of the memory cases against the true one, new views included.",
        (
            Column("memory/psnr_lcm", "PSNR, dB", "up"), Column("memory/ssim_lcm", "SSIM", "up"),
            Column("memory/lpips_lcm", "LPIPS", "down"),
            Column("memory/psnr_closure", "PSNR of last to first", "up"),
        ),
    ),
    Table(
        "The phases of MemoBench (object in view, gone, back)",
        "Frame by frame against the true video, from the image alone.",
        (
            Column("phase/psnr_visible", "PSNR in view", "up"), Column("phase/psnr_gone", "gone", "up"),
            Column("phase/psnr_back", "back", "up"), Column("phase/ssim_back", "SSIM back", "up"),
            Column("phase/lpips_back", "LPIPS back", "down"),
        ),
    ),
    Table(
        "VBench (videos of the action cases, not run by us)",
        "The six dimensions for any video, as VBench gives them.",
        tuple(Column(f"vbench/{name}", name.replace("_", " "), "up") for name in DIMENSIONS),
    ),
    Table(
        "Does it drift? (last second against the first)",
        "Means over cases, signed but for colour, a distance; what the camera sees changes these too, so "
        "read them beside the truth's.",
        (
            Column("drift/colour", "colour ΔE", ""), Column("drift/saturation", "saturation", ""),
            Column("drift/exposure", "exposure", ""), Column("drift/sharpness", "sharpness, log₂", ""),
        ),
    ),
)  # fmt: skip


def table_html(table: Table, summary: Mapping[str, Any], labels: Sequence[str]) -> str:
    """Return a table over all cases, empty if nothing of it was measured."""
    rows = [(label, "", summary[label].get("all", {}), "") for label in labels]
    rows += [
        (f"{title} ({label})" if len(labels) > 2 and tail == "_autoencoder" else title, tail, found, "beside")
        for tail, title in table.beside
        for label, found in _distinct(summary, labels[1:], tail=tail, columns=table.columns)
    ]
    columns = [c for c in table.columns if any(c.name in found for _, _, found, _ in rows)]
    if not columns or not any(_is_measured(found, columns) for _, _, found, _ in rows):
        return ""
    arrows = {"up": " ↑", "down": " ↓", "": ""}
    head = "".join(f"<th>{html.escape(c.title)}{arrows[c.best]}</th>" for c in columns)
    lines = "".join(
        f'<tr class="{kind}"><td>{html.escape(title)}</td>'
        + "".join(f"<td>{cell(found.get(c.name + tail))}</td>" for c in columns)
        + "</tr>"
        for title, tail, found, kind in rows
    )
    return (
        f"<h2>{html.escape(table.title)}</h2><p>{html.escape(table.about)}</p>"
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{lines}</table></div>'
    )


def _is_measured(found: Mapping[str, Any], columns: Sequence[Column]) -> bool:
    """Return whether any score, not only a count, has a value."""
    return any(found.get(c.name, {}).get("cases", 0) != 0 for c in columns)


def _distinct(
    summary: Mapping[str, Any], labels: Sequence[str], *, tail: str, columns: Sequence[Column]
) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield who has a line beside the others: floors of the truth are the same for all and are shown once."""
    known: list[list[Any]] = []
    for label in labels:
        found = summary[label].get("all", {})
        values = [found.get(column.name + tail) for column in columns]
        if any(values) and values not in known:
            known.append(values)
            yield label, found


def cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if "sum" in found:
        return str(found["sum"])
    if found["cases"] == 0:
        return "–"
    if found["low"] == found["high"]:
        return number(found["mean"])
    return f"{number(found['mean'])} <small>[{number(found['low'])}, {number(found['high'])}]</small>"


def number(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 10 else f"{value:.2f}"
