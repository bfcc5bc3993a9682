"""The action scripts of a suite, from the package's data: what is held, how long, and what it measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Literal, get_args

import torch
import yaml
from torch import Tensor

from relic.ops.actions import parse_script

__all__ = ["SUITES", "Script", "load_scripts", "prefix_frames", "select_scripts"]

SUITES = ("relic",)
STANDARD = (5, 10, 20, 60)  # seconds; shorter scripts are for worlds with a shorter horizon
Measures = Literal["action", "memory"]


@dataclass(frozen=True, kw_only=True)
class Script:
    """A path that a camera is asked to take.

    Args:
        group: Which of the suite's groups it is of.
        number: Its place among the scripts of its group and length.
        seconds: Its length.
        words: What is held, in the language of `relic.ops.actions.parse_script`.
        measures: "action": all but the image is generated, and motion is scored; "memory": the outward path
            is shown as truth, and what comes after is scored against truth as well.
        repeat: How often the words are played.
        gamma: Speed of the words: 1 is d̄, or 2 degrees, a frame.
        outward: Frames after the image that lead away.
        returns: Whether the last pose is the first one, at the speed that the suite gives.
    """

    group: str
    number: int
    seconds: int
    words: str
    measures: Measures
    repeat: int = 1
    gamma: float = 1.0
    outward: int = 0
    returns: bool = False

    @property
    def name(self) -> str:
        """E.g. "look_away-10s-0"."""
        return f"{self.group}-{self.seconds}s-{self.number}"

    def actions(self) -> Tensor:
        """Return its actions (f, 13) float64, a static frame for the image first."""
        once = parse_script(self.words, gamma=self.gamma)
        return torch.cat([once[:1], once[1:].repeat(self.repeat, 1)])


def load_scripts(suite: str = "relic") -> tuple[Script, ...]:
    """Read a suite's scripts.

    Raises:
        ValueError: If there is no such suite, or a script is not as long as it says.
    """
    if suite not in SUITES:
        raise ValueError(f"suite={suite!r} is not one of {', '.join(SUITES)}.")
    text = (files("relic.suite") / f"{suite}.yaml").read_text(encoding="utf-8")
    return parse_suite(yaml.safe_load(text))


def parse_suite(card: dict[str, Any]) -> tuple[Script, ...]:
    """Turn what a suite's file says into scripts, in its order."""
    scripts: list[Script] = []
    for group, entry in card["groups"].items():
        if entry["measures"] not in get_args(Measures):
            raise ValueError(f"{group}: measures={entry['measures']!r} must be action or memory.")
        counts: dict[int, int] = {}
        for row in entry["scripts"]:
            values = dict(row)
            seconds, words = values.pop("seconds"), values.pop("script")
            number = counts[seconds] = counts.get(seconds, -1) + 1
            script = Script(
                group=group, number=number, seconds=seconds, words=words, measures=entry["measures"],
                returns=entry.get("returns", False), **values,
            )  # fmt: skip
            frames, wanted = len(script.actions()) - 1, seconds * card["fps"]
            if frames != wanted:
                raise ValueError(f"{script.name} is {frames} frames long; {seconds} s are {wanted}.")
            if not 0 <= script.outward < frames:
                raise ValueError(f"{script.name}: outward={script.outward} must leave frames to generate.")
            scripts.append(script)
    return tuple(scripts)


def select_scripts(
    scripts: Sequence[Script],
    *,
    groups: Sequence[str] = (),
    seconds: Sequence[int] = (),
    gamma: float = 1.0,
) -> tuple[Script, ...]:
    """Return the scripts of some groups and lengths; none named means all, of the standard lengths.

    gamma: times their own speed.

    Raises:
        ValueError: If a group or a length is not in the suite, or `gamma` is not positive.
    """
    if not 0.0 < gamma < math.inf:
        raise ValueError(f"gamma={gamma} must be positive and finite: 1 plays the scripts as they are.")
    known_groups = tuple(dict.fromkeys(script.group for script in scripts))
    known_seconds = tuple(sorted({script.seconds for script in scripts}))
    for name, asked, known in (("groups", groups, known_groups), ("seconds", seconds, known_seconds)):
        unknown = [value for value in asked if value not in known]
        if unknown:
            raise ValueError(
                f"{name}: {', '.join(map(str, unknown))} is not among {', '.join(map(str, known))}."
            )
    return tuple(
        replace(script, gamma=script.gamma * gamma)
        for script in scripts
        if (not groups or script.group in groups) and script.seconds in (seconds or STANDARD)
    )


def prefix_frames(outward: int, *, block_frames: int, num_frames: int) -> int:
    """Return how many frames are shown as truth: the image and the whole blocks that cover the outward path.

    At least one block is left to generate.
    """
    blocks = min(-(-outward // block_frames), (num_frames - 1) // block_frames - 1)
    return 1 + blocks * block_frames
