"""A small run of the suite: two cases, three worlds of random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from relic.metrics.pose.visual_odometry import VisualOdometry
from relic.metrics.revisit import RevisitRule
from relic.ops.retention import Window
from relic.suite.judges import Judges
from relic.suite.play import Contestant
from relic.suite.run import run
from relic.suite.scripts import load_scripts
from relic.suite.truth import ScriptedCase, Setting
from tests.bundles import world_of
from tests.suite.worlds import five_seconds

SETTING = Setting(size=(32, 48), fps=16, d_bar=0.05, seed=7919, backend="software")
JUDGES = Judges(rule=RevisitRule(), lpips=None, estimator=VisualOdometry())
NAMES = ("look_away-5s-0", "pan-5s-1")


def cases_in(root: Path) -> list[ScriptedCase]:
    scripts = {script.name: script for script in load_scripts()}
    return [
        ScriptedCase(script=scripts[name], scene=0, setting=SETTING, cache=root / "truth") for name in NAMES
    ]


def contestants() -> list[Contestant]:
    return [
        Contestant(label="short", world=five_seconds()),
        Contestant(label="short (window:4)", world=five_seconds(Window(latents=4))),
        Contestant(label="too short", world=replace(world_of(steps=1), d_bar=0.05)),
    ]


def played(root: Path) -> list[dict[str, Any]]:
    return run(cases_in(root), contestants(), out=root, judges=JUDGES, seed=0, fps=16)
