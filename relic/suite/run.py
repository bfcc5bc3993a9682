"""Play and score all cases with all contestants; a case that is finished is kept, so a stopped run goes on.

OUT/videos/<contestant>/<case>.mp4    what was seen; `truth` is one of the folders
OUT/cases/<contestant>/<case>.json    its scores, written last: the mark of a finished case
OUT/theirs/<contestant>/...           files that another benchmark's own tools read
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from tqdm import tqdm

from relic.data.video import encode_video
from relic.suite.case import Case, NoTruth
from relic.suite.judges import Judges
from relic.suite.play import Contestant, play, reconstruct, why_not
from relic.suite.score import look_by_second, score_video, seamless
from relic.suite.scripts import prefix_frames
from relic.types import Clip

__all__ = ["TRUTH", "cases_of", "folder_of", "records_of", "run", "video_path"]

TRUTH: Final = "truth"  # scored like a contestant: the limit of every score, and the estimator's floor


def run(
    cases: Sequence[Case],
    contestants: Sequence[Contestant],
    *,
    out: Path,
    judges: Judges,
    seed: int,
    fps: float,
) -> list[dict[str, Any]]:
    """Play and score what is not finished yet; return the records of all, in order (`records_of`).

    Args:
        cases: What is played.
        contestants: By whom; sizes, rate and block length are the same for all.
        out: Folder of the results.
        judges: What is scored with.
        seed: Seed of the noise.
        fps: Frames a second of all worlds.
    """
    frames = sum(case.num_frames for case in cases) * (1 + len(contestants))
    with tqdm(total=frames, unit="frame", desc="evaluate", disable=None) as bar:
        for case in cases:
            bar.set_postfix_str(case.name)
            todo = [c for c in (None, *contestants) if not _is_finished(out, _label(c), case)]
            bar.update(case.num_frames * (1 + len(contestants) - len(todo)))
            for _ in _finish(case, todo, contestants, out=out, judges=judges, seed=seed, fps=fps):
                bar.update(case.num_frames)
    return records_of(cases, contestants, out=out)


def records_of(
    cases: Sequence[Case], contestants: Sequence[Contestant], *, out: Path
) -> list[dict[str, Any]]:
    """Return the records of cases, in order, the truth's before those of the contestants.

    A record holds case, contestant, group, measures, words, seconds, prefix, scores (None where NaN) and
    look; one of a skipped case `skipped`, the reason, instead of scores.

    Raises:
        FileNotFoundError: If one is not there yet.
    """
    everyone = (None, *contestants)
    return [_read(_record_path(out, _label(c), case)) for case in cases for c in everyone]


def _finish(
    case: Case,
    todo: Sequence[Contestant | None],
    contestants: Sequence[Contestant],
    *,
    out: Path,
    judges: Judges,
    seed: int,
    fps: float,
) -> Iterator[None]:
    """Score a case for those who lack it, one at a time; None stands for the truth itself."""
    if not todo:
        return
    reasons = {c.label: why_not(c.world, num_frames=case.num_frames) for c in contestants}
    clip: Clip | None = None
    missing = ""
    known: dict[str, Tensor] = {}  # the truth through each autoencoder
    if any(not (reasons[c.label] if c else all(reasons.values())) for c in todo):
        try:
            clip = case.truth()
        except NoTruth as error:
            missing = str(error)
    for contestant in todo:
        began = time.monotonic()
        record: dict[str, Any] = {
            "case": case.name, "contestant": _label(contestant), "group": case.group,
            "measures": case.measures, "words": case.words, "seconds": round((case.num_frames - 1) / fps, 3),
        }  # fmt: skip
        reason = missing or (reasons[contestant.label] if contestant else None)
        if clip is None or reason:
            record["skipped"] = reason or "no contestant can play it"
        else:
            prefix = prefix_frames(
                case.outward, block_frames=contestants[0].block_frames, num_frames=case.num_frames
            )
            rebuilt: Tensor | None = None
            video = clip.video
            if contestant:
                rebuilt = _rebuilt(contestant, clip, known=known)
                video = play(contestant.world, clip, prefix=prefix, seed=seed)
            _write(
                video_path(out, _label(contestant), case.name), encode_video(video.numpy(), fps=clip.fps)[0]
            )
            shown = seamless(video, prefix=prefix, reconstruction=rebuilt)
            scores = score_video(
                video, clip, prefix=prefix, measures=case.measures, judges=judges, reconstruction=rebuilt
            )
            folder = out / "theirs" / folder_of(_label(contestant))
            extras = dict(case.extras(video, clip, judges=judges, folder=folder))
            scores |= extras.pop("scores", {})
            record |= extras
            record |= {
                "prefix": prefix, "fps": clip.fps, "provenance": dict(clip.provenance),
                "prompt": clip.captions[0] if clip.captions else "",
                "scores": {name: None if math.isnan(value) else value for name, value in scores.items()},
                "look": look_by_second(shown, fps=clip.fps), "wall_s": round(time.monotonic() - began, 2),
            }  # fmt: skip
        _write(_record_path(out, _label(contestant), case), json.dumps(record, indent=1).encode())
        yield


def _rebuilt(contestant: Contestant, clip: Clip, *, known: dict[str, Tensor]) -> Tensor:
    """Return the truth through a contestant's autoencoder, once for all that share it."""
    name = contestant.autoencoder
    if name not in known:
        device = next(contestant.world.net.parameters()).device
        known[name] = reconstruct(
            contestant.world.vae, clip.video, block_frames=contestant.block_frames, device=device
        )
    return known[name]


def _is_finished(out: Path, label: str, case: Case) -> bool:
    """Return whether a case is scored and its video there. What was skipped is tried again: its reason may
    be gone.
    """
    path = _record_path(out, label, case)
    return path.exists() and "scores" in _read(path) and video_path(out, label, case.name).exists()


def folder_of(label: str) -> str:
    """Return the name of a contestant's folder."""
    return re.sub(r"[^\w.+-]+", "-", label).strip("-.") or "world"


def cases_of(out: Path, label: str) -> Path:
    """Return the folder of a contestant's records."""
    return out / "cases" / folder_of(label)


def video_path(out: Path, label: str, case: str) -> Path:
    """Return where the video of a case is."""
    return out / "videos" / folder_of(label) / f"{case}.mp4"


def _label(contestant: Contestant | None) -> str:
    return contestant.label if contestant else TRUTH


def _record_path(out: Path, label: str, case: Case) -> Path:
    return cases_of(out, label) / f"{case.name}.json"


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
