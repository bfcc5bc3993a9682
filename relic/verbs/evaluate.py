"""`relic evaluate`: play a suite with one or several worlds, score it and write the report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from relic.data.claim import alone, claim, in_turn
from relic.engine.capture import Backend, choose_backend
from relic.engine.recording import ENGINE
from relic.metrics.pose.estimator import PoseEstimator
from relic.metrics.pose.visual_odometry import VisualOdometry
from relic.metrics.revisit import RevisitRule
from relic.metrics.similarity import LPIPS, LPIPSUnavailable, load_lpips
from relic.ops.retention import parse_policy
from relic.suite.case import Case
from relic.suite.judges import Judges
from relic.suite.memobench import find_memobench
from relic.suite.mind import MindCase, find_mind, mind_result
from relic.suite.play import Contestant, why_not
from relic.suite.recordings import Shape
from relic.suite.report import build_report, write_report
from relic.suite.run import cases_of, folder_of, records_of, run, video_path
from relic.suite.scripts import SUITES, Script, load_scripts, select_scripts
from relic.suite.summary import machine
from relic.suite.truth import ScriptedCase, Setting
from relic.suite.vbench import VBenchUnavailable, run_vbench
from relic.world import World, find_bundle, read_card

__all__ = ["evaluate"]

FORMAT = "relic-run/2"  # of what a run writes down, and of how memories choose
SETTINGS, CONTESTANT = "evaluation.json", "contestant.json"
ENDLESS = 961  # frames that a world without a horizon is asked for, a minute
LEAST_SIDE = 32  # pixels: less is too small for LPIPS


def evaluate(
    bundle: str,
    *,
    suite: Literal["relic", "mind", "memobench"] = "relic",
    data: str | None = None,
    out: str = "runs/evaluation",
    beside: tuple[str, ...] = (),
    policy: tuple[str, ...] = ("own",),
    groups: tuple[str, ...] = (),
    seconds: tuple[int, ...] = (),
    scenes: int = 1,
    gamma: float = 1.0,
    seed: int = 7919,
    noise_seed: int = 0,
    cache: str | None = None,
    lpips: str | None = None,
    vbench: str | None = None,
    part: tuple[int, int] = (0, 1),
    backend: Backend = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Play scripted camera paths in unseen scenes and score memory, motion and drift against the engine.

    Stopped at any moment, the same command goes on; a finished case is kept, so more worlds can be laid
    beside those of a run later. The result is report.html and report.json in the folder of the run, and all
    videos.

    Args:
        bundle: Folder of the world, from relic export, or the name of a shipped one: tiny.
        suite: Scripts in the engine's scenes (relic), or the clips of a benchmark's folder (mind, memobench).
        data: That folder.
        out: Folder of the run.
        beside: Further bundles, of the same size, rate, block length and d_bar.
        policy: Memories that each bundle is played with: own, full, window:8, sink_window:1:8, compressed:8,
            compressed:8:1,4,2 (its schedule).
        groups: Groups of scripts; all by default.
        seconds: Lengths of scripts, 5 10 20 60; all by default. What is beyond a world's horizon is skipped;
            4 is for worlds that are shorter than 5 s.
        scenes: Scenes in which each script is played.
        gamma: Speed of the scripts' motion; 2 goes and turns twice as far in the same time.
        seed: Seed of the scenes; it must not be one that a training set was rendered with.
        noise_seed: Seed of the worlds' noise.
        cache: Folder of true clips, raw pixels; by default truth/ in the folder of the run.
        lpips: File with torchvision's AlexNet; by default the one in torch's cache, if it is there.
        vbench: Command of a VBench installation; by default its dimensions are not measured.
        part: Number, from 0, and count of processes that share the cases, each given its own number; who ends
            last writes the report.
        backend: Renderer.
        device: Where to compute; auto takes a GPU if there is one, and bf16 there.
    """
    # a wrong word fails before anything is loaded
    scripts = check_words(suite, data=data, groups=groups, seconds=seconds, scenes=scenes, gamma=gamma)
    if vbench is not None and not (vbench.split() and shutil.which(vbench.split()[0])):
        raise ValueError(
            f"vbench={vbench!r} is no command here; give the path of your installation's vbench."
        )
    place = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    contestants = load_contestants((bundle, *beside), policies=policy, device=place)
    first = contestants[0].world
    clip = first.config.clip
    size, root = (clip.height, clip.width), Path(out)
    cases: list[Case]
    if data is None:
        setting = Setting(size=size, fps=clip.fps, d_bar=first.d_bar, seed=seed, backend=backend)
        truths = Path(cache) if cache else root / "truth"
        cases = [
            ScriptedCase(script=script, scene=scene, setting=setting, cache=truths)
            for script in scripts
            for scene in range(scenes)
        ]
    else:
        cases = recorded_cases(suite, data, contestants, groups=groups)
    check_lengths(cases, contestants)
    not_measured: list[str] = []
    judges = Judges(
        rule=RevisitRule(),
        lpips=find_lpips(lpips, size=size, device=place, missing=not_measured),
        estimator=find_estimator(not_measured),
    )
    if suite == "memobench" and not any(getattr(case, "leaves", None) for case in cases):
        not_measured.append("Phases: not measured, their table is not there as CSV (docs/evaluation.md).")
    settings: dict[str, Any] = {
        "format": FORMAT,
        "suite": suite,
        "data": data,
        "tables": digest_of(sorted(Path(data).rglob("*.csv"))) if suite == "memobench" and data else None,
        "engine": f"{ENGINE}, {choose_backend(backend)}" if data is None else None,
        "scripts": digest(repr(load_scripts(suite)).encode()) if data is None else None,
        "size": f"{clip.height}x{clip.width}",
        "fps": clip.fps,
        "d_bar": first.d_bar,
        "block_latents": clip.block_latents,
        "most_frames": most_frames(contestants) if data is not None else None,
        "gamma": gamma,
        "seed": seed,
        "noise_seed": noise_seed,
        "device": place,
        "lpips": digest(judges.lpips.get_buffer("weight_0").cpu().numpy().tobytes())
        if judges.lpips
        else None,
        "estimator": type(judges.estimator).__name__ if judges.estimator else None,
        "rule": str(judges.rule),
    }
    with alone(root, part=part):
        claim(root, settings, file=SETTINGS, meaning={"format": "an earlier version"})
        for who in contestants:
            claim(cases_of(root, who.label), described(who), file=CONTESTANT, meaning={})
        share = cases[part[0] :: part[1]]
        print(f"evaluate   {len(share)} cases, {', '.join(c.label for c in contestants)}; {place}")
        run(share, contestants, out=root, judges=judges, seed=noise_seed, fps=clip.fps)
        try:
            records = records_of(cases, contestants, out=root)
        except FileNotFoundError:
            print(f"scored     part {part[0]} of {part[1]}; others are to come.")
            return
        with in_turn(root):  # parts that end together
            dimensions = measure_vbench(vbench, cases, contestants, root=root, missing=not_measured)
            asked = {"groups": list(groups) or "all", "seconds": list(seconds) or "all", "scenes": scenes}
            unsaid = ("format", "most_frames", "rule")
            kept = {name: value for name, value in settings.items() if name not in unsaid}
            report = build_report(
                records, contestants, title=f"{suite}: {', '.join(c.label for c in contestants)}",
                rule=str(judges.rule), settings=kept | asked, machine=machine(place),
                not_measured=not_measured, vbench=dimensions,
            )  # fmt: skip
            write_report(root, report)
            if suite == "mind":
                write_mind_results(cases, contestants, records, root=root)
    for text in not_measured:
        print(f"missing    {text}")
    print(f"scored     {report['cases_scored']} cases, {len(report['skipped'])} skipped")
    print(f"wrote      {root / 'report.html'} and {root / 'report.json'}")


def described(contestant: Contestant) -> dict[str, Any]:
    """Return what decides every frame that a contestant plays."""
    world = contestant.world
    return {
        "label": contestant.label, "policy": str(world.config.policy),
        "sampler": str(world.config.sampler), "d_bar": world.d_bar,
        "files": contestant.files,
    }  # fmt: skip


def digest(data: bytes) -> str:
    """Return a short hash, by which a run knows that it goes on with the same things."""
    return hashlib.sha256(data).hexdigest()[:16]


def digest_of(paths: Sequence[Path]) -> str:
    """Return a short hash of files, names and all."""
    return digest(b"".join(path.name.encode() + path.read_bytes() for path in paths))


def check_words(
    suite: str,
    *,
    data: str | None,
    groups: Sequence[str],
    seconds: Sequence[int],
    scenes: int,
    gamma: float = 1.0,
) -> tuple[Script, ...]:
    """Return the scripts that were asked for, none of a recorded suite.

    Raises:
        ValueError: If options don't exist or don't go together.
    """
    if scenes < 1:
        raise ValueError(f"scenes={scenes} must be at least 1.")
    if suite in SUITES:
        if data is not None:
            raise ValueError(f"data={data} is for mind and memobench; the suite {suite} films its own truth.")
        return select_scripts(load_scripts(suite), groups=groups, seconds=seconds, gamma=gamma)
    if data is None:
        raise ValueError(f"suite={suite} needs --data, the folder of that benchmark.")
    if seconds or scenes != 1 or gamma != 1.0:
        raise ValueError(f"seconds, scenes and gamma are of scripts; the clips of {suite} are as they are.")
    return ()


def recorded_cases(
    suite: str, data: str, contestants: Sequence[Contestant], *, groups: Sequence[str]
) -> list[Case]:
    """Find the clips of a benchmark's folder, cut to what all contestants can play."""
    world = contestants[0].world
    shape = Shape.of(
        world.config.clip,
        d_bar=world.d_bar,
        most_frames=most_frames(contestants),
    )
    cases: list[Case] = []
    cases += find_mind(data, shape=shape) if suite == "mind" else find_memobench(data, shape=shape)
    known = dict.fromkeys(case.group for case in cases)
    unknown = [group for group in groups if group not in known]
    if unknown:
        raise ValueError(f"groups: {', '.join(unknown)} is not among {', '.join(known)}.")
    return [case for case in cases if not groups or case.group in groups]


def most_frames(contestants: Sequence[Contestant]) -> int:
    """Return the length of the longest clip that all contestants can play."""
    return min(ENDLESS if c.world.endless else c.world.config.clip.max_frames for c in contestants)


def write_mind_results(
    cases: Sequence[Case], contestants: Sequence[Contestant], records: Sequence[dict[str, Any]], *, root: Path
) -> None:
    """Write a result.json in MIND's form for each contestant."""
    for contestant in contestants:
        rows = {row["case"]: row for row in records if row["contestant"] == contestant.label}
        entries = [
            (case, rows[case.name].get("mind") or {"error": rows[case.name]["skipped"]})
            for case in cases
            if isinstance(case, MindCase)
        ]
        path = root / "theirs" / folder_of(contestant.label) / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mind_result(entries), indent=1), encoding="utf-8")


def load_contestants(bundles: Sequence[str], *, policies: Sequence[str], device: str) -> list[Contestant]:
    """Load bundles and give each its memories.

    Raises:
        FileNotFoundError, ValueError: If one can't be loaded or played, or they don't belong in one table.
    """
    if not policies:
        raise ValueError("policy is empty; name at least one, e.g. own.")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found: list[Contestant] = []
    for bundle in bundles:
        world = World.load(bundle, device=device, dtype=dtype)
        root = find_bundle(bundle)
        files = digest(json.dumps(read_card(root)["files"], sort_keys=True).encode())
        name = root.resolve().name
        for text in policies:
            kind = parse_policy(text, own=world.config.policy)
            played = replace(world, config=replace(world.config, policy=kind))
            label = name if tuple(policies) == ("own",) else f"{name} ({text})"
            found.append(Contestant(label=label, world=played, files=files))
    folders = [folder_of(contestant.label) for contestant in found]
    if len(set(folders)) < len(folders) or "truth" in folders:
        raise ValueError(
            f"contestants are called {', '.join(c.label for c in found)}; they must differ, and none be "
            "called truth: rename a bundle's folder, or name no policy twice."
        )
    for other in found[1:]:
        for what, ours, theirs in _shared(found[0].world, other.world):
            if ours != theirs:
                raise ValueError(
                    f"{found[0].label} has {what} {ours}, {other.label} {theirs}; only worlds that are "
                    "played on the same truth fit in one table: evaluate them apart."
                )
    return found


def _shared(one: World, other: World) -> list[tuple[str, Any, Any]]:
    a, b = one.config.clip, other.config.clip
    return [
        ("size", (a.height, a.width), (b.height, b.width)), ("fps", a.fps, b.fps),
        ("block_latents", a.block_latents, b.block_latents), ("d_bar", one.d_bar, other.d_bar),
    ]  # fmt: skip


def check_lengths(cases: Sequence[Case], contestants: Sequence[Contestant]) -> None:
    """Raise ValueError if no case can be played by any contestant."""
    reasons = [
        why_not(contestant.world, num_frames=case.num_frames) for case in cases for contestant in contestants
    ]
    if all(reasons):
        raise ValueError(
            f"none of the {len(cases)} cases can be played: {reasons[0]}. Take shorter ones (--seconds), or "
            "export the world with --max_latents, which makes it endless."
        )


def find_lpips(path: str | None, *, size: tuple[int, int], device: str, missing: list[str]) -> LPIPS | None:
    """Load LPIPS, or note why it is not measured. A file that was named must be there.

    Raises:
        FileNotFoundError, ValueError: If `path` is given and can't be read.
    """
    if min(size) < LEAST_SIDE:
        missing.append(f"LPIPS: not measured, pictures of {size[0]}x{size[1]} are too small for it.")
        return None
    try:
        return load_lpips(path, device=device)
    except LPIPSUnavailable as error:
        if path is not None:
            raise
        missing.append(str(error))
        return None


def find_estimator(missing: list[str]) -> PoseEstimator | None:
    """Return the estimator of cameras, or note why motion is not measured."""
    lacking = [name for name in ("cv2", "scipy") if find_spec(name) is None]
    if lacking:
        missing.append(
            f"Motion: not measured, and whether cameras returned; {' and '.join(lacking)} not installed: pip "
            "install 'relic-world[metrics]'."
        )
        return None
    return VisualOdometry()


def measure_vbench(
    command: str | None,
    cases: Sequence[Case],
    contestants: Sequence[Contestant],
    *,
    root: Path,
    missing: list[str],
) -> dict[str, dict[str, float]]:
    """Run VBench on the videos of the action cases, which but for their image are generated throughout."""
    if command is None:
        missing.append("VBench: not measured; name the command of an installation with --vbench.")
        return {}
    shutil.rmtree(root / "vbench", ignore_errors=True)  # what stands there may be of other cases
    found = {}
    for contestant in contestants:
        folder = root / "vbench" / folder_of(contestant.label)
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            video = video_path(root, contestant.label, case.name)
            if case.measures == "action" and video.exists():
                shutil.copyfile(video, folder / f"{case.name}.mp4")
        try:
            found[contestant.label] = run_vbench(folder, command=command.split())
        except VBenchUnavailable as error:
            missing.append(str(error))
            return {}
        except (RuntimeError, ValueError) as error:  # hours of play are not thrown away for it
            missing.append(f"VBench: not measured for {contestant.label}: {error}")
    return found
