"""What a scripted path really looks like: a start that keeps it in free space, filmed, kept on disk.

A scripted action becomes engine motion with the world's d̄, and the clip carries that d̄, never its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from relic.engine.building import make_scene
from relic.engine.capture import Backend, choose_backend
from relic.engine.recording import ENGINE, film
from relic.engine.scenes import Scene
from relic.engine.space import FreeSpace
from relic.ops.actions import integrate
from relic.ops.camera import rigid, rotation_from_angles
from relic.ops.randomness import derive_seed
from relic.suite.case import NoTruth
from relic.suite.judges import Judges
from relic.suite.scripts import Measures, Script
from relic.types import Clip

__all__ = ["ScriptedCase", "Setting", "find_start"]

FORMAT: Final = "relic-truth/2"
STARTS: Final = 400  # tried in a scene
SCENES: Final = 6  # tried for a case
PLACES: Final = 1_000_000  # scenes there are to choose from: each case has scenes of its own
EYE: Final = (1.0, 1.9)  # m above the floor
CHOICE: Final = 8  # starts that fit, from which one is chosen
LOOKS: Final = 12  # frames of a path at which it is asked how far the camera sees
OUTLOOK_M: Final = 4.0  # as far as it counts: a wall close by shows nothing to remember
COARSE: Final = 8  # every so many frames are looked at first


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all truth of a run has in common.

    Args:
        size: Height and width in pixels.
        fps: Frames a second.
        d_bar: Metres a frame that 1.0 of a translation stands for: the world's.
        seed: Of the scenes; one that no training set was rendered with.
        backend: Renderer.
    """

    size: tuple[int, int]
    fps: float
    d_bar: float
    seed: int
    backend: Backend = "auto"


@dataclass(frozen=True, kw_only=True)
class ScriptedCase:
    """A script in a scene; see `relic.suite.case.Case`.

    Args:
        script: The path.
        scene: Number of the scene among those asked for.
        setting: Sizes, d̄ and seed.
        cache: Folder of raw pixels; a minute of 128x256 is 94 MB.
    """

    script: Script
    scene: int
    setting: Setting
    cache: Path

    @property
    def name(self) -> str:
        """E.g. "look_away-10s-0-scene-0"."""
        return f"{self.script.name}-scene-{self.scene}"

    @property
    def group(self) -> str:
        return self.script.group

    @property
    def measures(self) -> Measures:
        return self.script.measures

    @property
    def words(self) -> str:
        """The script as it is typed."""
        script = self.script
        times = f" ({script.repeat} times)" if script.repeat > 1 else ""
        return f"{script.words}{times}" + (f", gamma {script.gamma:g}" if script.gamma != 1 else "")

    @property
    def num_frames(self) -> int:
        return len(self.script.actions())

    @property
    def outward(self) -> int:
        return self.script.outward

    def truth(self) -> Clip:
        """Return the clip, from the cache if it was filmed before.

        Raises:
            NoTruth: If the path fits in none of the scenes that are tried; it is never shrunk to fit.
        """
        setting = replace(self.setting, backend=choose_backend(self.setting.backend))
        actions = self.script.actions()
        key = {
            "format": FORMAT, "engine": ENGINE, "script": self.script.name, "scene": self.scene,
            "actions": hashlib.sha256(actions.numpy().tobytes()).hexdigest(), **asdict(setting),
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = self.cache / f"{self.name}-{digest}.safetensors"
        if path.exists():
            return _read(path)
        poses = integrate(actions, d_bar=setting.d_bar)
        for attempt in range(SCENES):
            place = derive_seed("suite scene", self.script.name, self.scene, attempt) % PLACES
            scene = make_scene(setting.seed, place)
            start = find_start(scene, poses, seed=derive_seed("suite", setting.seed, self.script.name))
            if start is not None:
                clip = film(
                    scene, start @ poses, fps=setting.fps, size=setting.size, backend=setting.backend
                )._replace(d_bar=setting.d_bar)
                _write(path, clip)
                return clip
        length = float((poses[1:, :3, 3] - poses[:-1, :3, 3]).norm(dim=-1).sum())
        raise NoTruth(
            f"no start keeps the path clear of walls and furniture in {SCENES} scenes, {STARTS} starts "
            f"each: it "
            f"is {length:.1f} m long at d_bar={setting.d_bar:g} m a frame."
        )

    def extras(self, video: Tensor, truth: Clip, *, judges: Judges, folder: Path) -> dict[str, Any]:
        """Nothing: all of it is measured for every suite."""
        return {}


def find_start(scene: Scene, path: Tensor, *, seed: int) -> Tensor | None:
    """Return a first pose (4, 4) from which a path stays in free space, level and with much in view.

    Of the first few that will do, the one that looks furthest on its way. The same for equal arguments; None
    if none of many draws will do. path: (f, 4, 4) from the identity, metres.
    """
    rng = np.random.default_rng(derive_seed("start", scene.seed, scene.index, seed))
    space = FreeSpace(scene)
    offsets = path[:, :3, 3].numpy()
    looks = np.linspace(0, len(path) - 1, LOOKS).round().astype(int)
    found: list[tuple[float, Tensor]] = []
    for _ in range(STARTS):
        room = scene.rooms[int(rng.integers(len(scene.rooms)))]
        heading = float(rng.uniform(-180, 180))
        low, high = np.array(room.low), np.array(room.high)
        low[1], high[1] = -EYE[1], -EYE[0]
        point = space.place(rng, low=low, high=high)
        if point is None:
            continue
        rotation = rotation_from_angles(torch.tensor([heading, 0.0, 0.0], dtype=torch.float64))
        places = offsets @ rotation.numpy().T + point
        if not all((space.gaps(part.T) >= space.clearance).all() for part in (places[::COARSE], places)):
            continue
        ahead = (rotation @ path[looks, :3, 2].mT).mT.numpy()
        outlook = [space.reach(places[i], way, limit=OUTLOOK_M) for i, way in zip(looks, ahead, strict=True)]
        found.append((sum(outlook), rigid(rotation, torch.from_numpy(point))))
        if len(found) == CHOICE:
            break
    return max(found, key=lambda entry: entry[0])[1] if found else None


def _write(path: Path, clip: Clip) -> None:
    """Write a clip whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words: dict[str, Any] = {
        "format": FORMAT, "fps": clip.fps, "d_bar": clip.d_bar, "captions": clip.captions,
        "provenance": dict(clip.provenance),
    }  # fmt: skip
    tensors = {"video": clip.video, "c2w": clip.c2w.contiguous(), "intrinsics_px": clip.intrinsics_px}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"clip": json.dumps(words)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> Clip:
    with safe_open(path, framework="pt") as file:
        words = json.loads(file.metadata()["clip"])
        video, c2w, intrinsics_px = (file.get_tensor(name) for name in ("video", "c2w", "intrinsics_px"))
    return Clip(
        video=video,
        c2w=c2w,
        intrinsics_px=intrinsics_px,
        fps=words["fps"],
        d_bar=words["d_bar"],
        captions=tuple(words["captions"]),
        provenance=words["provenance"],
    )
