"""The report as a page that holds everything itself: tables, curves, and videos side by side."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from relic.data.video import decode_video, encode_video
from relic.suite.run import TRUTH, video_path
from relic.suite.tables import TABLES, cell, number, table_html

__all__ = ["STYLE", "image", "write_page"]

STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
table { border-collapse: collapse; }
td, th { padding: .3rem 1rem; border-bottom: 1px solid #ddd; text-align: left; }
figure { margin: 2rem 0; } img { display: block; margin: .4rem 0; max-width: 100%; }
figure img { image-rendering: pixelated; min-width: 60%; } figcaption { color: #666; font-size: .9rem; }
"""
OWN_STYLE: Final = """
.scroll { overflow-x: auto; } .scroll td, .scroll th { padding: .25rem .5rem; font-size: .85rem; }
td { white-space: nowrap; } td:first-child { white-space: normal; } td small { color: #777; display: block; }
tr.beside td { color: #777; font-style: italic; }
video { display: block; width: 100%; image-rendering: pixelated; }
.notes li { margin: .3rem 0; } details { margin: .6rem 0; } .bad { color: #a33; }
"""
GIVEN, MADE = (150, 150, 150), (214, 96, 36)  # the bar over a panel: true frames, generated frames
MAIN: Final = (
    "memory/psnr_revisit",
    "memory/lpips_revisit",
    "action/rpe_trans_8",
    "action/rpe_rot_deg_8",
    "action/coverage",
)
BAR, GAP = 4, 4  # pixels
SMALL: Final[dict[str, Any]] = {"quality": 29, "preset": "medium"}  # to look at, not to measure


def write_page(path: Path, report: Mapping[str, Any], *, root: Path, shown: Sequence[str]) -> None:
    """Write the page of a report.

    Args:
        path: The HTML file.
        report: What `report.json` holds.
        root: Folder of the run, with its videos.
        shown: Names of the cases whose videos are put into the page.
    """
    labels = [entry["label"] for entry in report["contestants"]]
    parts = [f"<h1>{html.escape(report['title'])}</h1>", _facts(report)]
    parts += [table_html(table, report["summary"], [TRUTH, *labels]) for table in TABLES]
    parts += [
        _differences(report, labels),
        _curves(report, labels),
        _by_part(report["summary"], [TRUTH, *labels]),
    ]
    parts += ["<h2>Videos</h2>", f"<p>Left to right: {html.escape(', '.join([TRUTH, *labels]))}. ", LEGEND]
    parts += [_figure(report, name, root=root, labels=[TRUTH, *labels]) for name in shown]
    parts += [_skipped(report), _all_cases(report)]
    body = "\n".join(part for part in parts if part)
    head = f'<meta charset="utf-8"><title>{html.escape(report["title"])}</title>'
    page = f'<!doctype html>\n<html lang="en">{head}\n<style>{STYLE}{OWN_STYLE}</style>\n{body}\n</html>\n'
    path.write_text(page, encoding="utf-8")


LEGEND: Final = (
    "A grey bar over a picture marks true frames, an orange one generated frames. All videos are in the "
    "folder "
    "<code>videos</code>.</p>"
)


def image(data: bytes, kind: str) -> str:
    """Return a picture as an element that holds it. kind: png, webp, svg+xml."""
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


# -- text ----------------------------------------------------------------------------------------------------


def _facts(report: Mapping[str, Any]) -> str:
    made = report["machine"]
    rows = {
        "cases": f"{report['cases_scored']} scored, {len(report['skipped'])} skipped (below)"
        + (
            f"; {report['cases_of_some']} more that not all could play, in report.json alone"
            if report["cases_of_some"]
            else ""
        ),
        "revisits": report["rule"],
        "settings": ", ".join(
            f"{name} {_words(value)}" for name, value in report["settings"].items() if value is not None
        ),
        "made on": f"{made['device']}, {made['processor']}, commit {made['commit'] or 'unknown'}",
        "versions": ", ".join(f"{name} {value or 'missing'}" for name, value in made["versions"].items()),
        "intervals": report["intervals"],
    }
    items = "".join(f"<li>{name}: {html.escape(str(value))}</li>" for name, value in rows.items())
    missing = "".join(f'<li class="bad">{html.escape(text)}</li>' for text in report["not_measured"])
    worlds = "".join(
        f"<li>{html.escape(c['label'])}: {html.escape(c['policy'])}, d̄ {c['d_bar']:g}, student "
        f"{c['student'][:12]}</li>"
        for c in report["contestants"]
    )
    return f'<ul class="notes">{missing}{items}{worlds}</ul>'


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _by_part(summary: Mapping[str, Any], labels: Sequence[str]) -> str:
    """Return the main scores by group and by length, folded away."""
    blocks = []
    for name in MAIN:
        parts = [p for p in summary[labels[-1]] if p != "all" and name in summary[labels[-1]][p]]
        if not parts:
            continue
        head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
        lines = "".join(
            f"<tr><td>{html.escape(part)}</td>"
            + "".join(f"<td>{cell(summary[label].get(part, {}).get(name))}</td>" for label in labels)
            + "</tr>"
            for part in parts
        )
        blocks.append(
            f'<details><summary>{name}</summary><div class="scroll"><table><tr><th></th>{head}</tr>{lines}'
            "</table></div></details>"
        )
    return f"<h2>By group and length</h2>{''.join(blocks)}" if blocks else ""


def _differences(report: Mapping[str, Any], labels: Sequence[str]) -> str:
    """Compare the contestants with the first one, case by case."""
    found = report["differences"]
    names = [name for name in MAIN if any(name in found[label] for label in labels[1:])]
    if not names:
        return ""
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = "".join(
        f"<tr><td>{html.escape(label)}</td>"
        + "".join(f"<td>{cell(found[label].get(name))}</td>" for name in names)
        + "</tr>"
        for label in labels[1:]
    )
    about = (
        f"Score minus that of {html.escape(labels[0])}, case by case; an interval without 0 tells them apart."
    )
    return (
        f'<h2>Against the first</h2><p>{about}</p><div class="scroll"><table><tr><th></th>{head}</tr>{lines}'
        "</table></div>"
    )


def _skipped(report: Mapping[str, Any]) -> str:
    """List what was skipped by its reason: a horizon is the same reason for many cases."""
    reasons: dict[str, list[str]] = {}
    for row in report["skipped"]:
        reasons.setdefault(f"{row['contestant']}: {row['skipped']}", []).append(row["case"])
    items = "".join(
        f"<li><details><summary>{html.escape(reason)} ({len(names)} cases)</summary>"
        f"{html.escape(', '.join(names))}</details></li>"
        for reason, names in reasons.items()
    )
    return f"<h2>Skipped</h2><ul>{items}</ul>" if items else ""


def _all_cases(report: Mapping[str, Any]) -> str:
    names = (
        "memory/psnr_revisit",
        "memory/psnr_lcm",
        "action/rpe_trans_8",
        "action/rpe_rot_deg_8",
        "drift/colour",
    )
    lines = []
    for row in report["cases"]:
        cells = "".join(
            f"<td>{'' if row['scores'].get(name) is None else number(row['scores'][name])}</td>"
            for name in names
        )
        lines.append(
            f"<tr><td>{html.escape(row['case'])}</td><td>{html.escape(row['contestant'])}</td>{cells}</tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        '<h2>All cases</h2><details><summary>the scores of each</summary><div class="scroll"><table>'
        f"<tr><th>case</th><th>contestant</th>{head}</tr>{''.join(lines)}</table></div></details>"
    )


# -- pictures ------------------------------------------------------------------------------------------------


def _curves(report: Mapping[str, Any], labels: Sequence[str]) -> str:
    """Draw PSNR against time out of sight, and the look of the videos over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4))
    summary = report["summary"]
    lines = [(label, label, "", "-") for label in labels]
    lines += [
        (labels[0], "nearest seen", "_nearest_seen", ":"), (labels[0], "first frame", "_copy_first", ":"),
        (labels[0], "autoencoder", "_autoencoder", "--"),
    ]  # fmt: skip
    for label, title, tail, style in lines:
        points = since_last_seen(summary[label].get("all", {}), tail=tail)
        if points:
            places, values = zip(*points, strict=True)
            axes[0].plot(places, values, style, marker="o", label=title, color=None if not tail else "#999")
    axes[0].set(title="PSNR at revisits", xlabel="seconds out of sight", ylabel="dB")
    if axes[0].lines:
        axes[0].legend(fontsize=7)
    for axis, name in zip(axes[1:], ("saturation", "exposure", "sharpness"), strict=True):
        for label in (TRUTH, *labels):
            rows = [r["look"][name] for r in report["cases"] if r["contestant"] == label]
            if rows:
                means = [
                    np.mean([row[s] for row in rows if len(row) > s]) for s in range(max(map(len, rows)))
                ]
                axis.plot(range(len(means)), means, label=label, color="#222" if label == TRUTH else None)
        axis.set(title=name, xlabel="second")
    if axes[1].lines:
        axes[1].legend(fontsize=7)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    plt.close(figure)
    about = "Means over the cases that reach so far. Drift is where a line leaves that of the truth."
    return f"<h2>Over time</h2>{image(buffer.getvalue(), 'png')}<p>{about}</p>"


def since_last_seen(found: Mapping[str, Any], *, tail: str = "") -> list[tuple[float, float]]:
    """Return (seconds, PSNR) from the scores by time out of sight: the middle of each bin, its start if
    open.
    """
    points = []
    for name, value in found.items():
        match = re.fullmatch(rf"memory/psnr_revisit{tail}_after_([\d.]+)(?:_([\d.]+))?s(?:_up)?", name)
        if match and value["cases"]:
            low, high = float(match[1]), float(match[2] or match[1])
            points.append(((low + high) / 2, float(value["mean"])))
    return sorted(points)


def _figure(report: Mapping[str, Any], case: str, *, root: Path, labels: Sequence[str]) -> str:
    rows = {row["contestant"]: row for row in report["cases"] if row["case"] == case}
    known = [label for label in labels if label in rows]
    if len(known) < 2:
        return ""
    prefix, fps = rows[known[-1]]["prefix"], rows[known[-1]]["fps"]
    panels = []
    for label in known:
        video = torch.from_numpy(decode_video(video_path(root, label, case).read_bytes()))
        panels.append(barred(video, given=len(video) if label == TRUTH else prefix))
    data, _ = encode_video(beside(panels).numpy(), fps=fps, **SMALL)
    source = base64.b64encode(data).decode()
    row = rows[known[-1]]
    caption = f"{case}: {row['words']}. {row['prompt']} ({prefix} true frames)"
    return (
        f'<figure><video controls loop muted playsinline src="data:video/mp4;base64,{source}"></video>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def barred(video: Tensor, *, given: int) -> Tensor:
    """Put a bar over a video (f, h, w, 3) that tells true frames, the first `given`, from generated ones."""
    bar = torch.empty(len(video), BAR, video.shape[2], 3, dtype=torch.uint8)
    bar[:given], bar[given:] = torch.tensor(GIVEN, dtype=torch.uint8), torch.tensor(MADE, dtype=torch.uint8)
    return torch.cat([bar, video], dim=1)


def beside(panels: Sequence[Tensor]) -> Tensor:
    """Join videos (f, h, w, 3) side by side, white between them."""
    gap = torch.full((*panels[0].shape[:2], GAP, 3), 255, dtype=torch.uint8)
    return torch.cat([part for panel in panels for part in (panel, gap)][:-1], dim=2)
