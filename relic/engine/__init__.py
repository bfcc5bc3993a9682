"""The embedded engine: seeded rooms, human-like camera paths, pictures. Importing it loads no renderer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relic.engine.building import make_scene
    from relic.engine.captions import describe
    from relic.engine.capture import Camera, choose_backend, intrinsics_of, opencv_to_panda, shoot
    from relic.engine.recording import ENGINE, film, provenance_of
    from relic.engine.scenes import Scene
    from relic.engine.space import CLEARANCE, FreeSpace
    from relic.engine.trajectories import make_trajectory

__all__ = [
    "CLEARANCE",
    "ENGINE",
    "Camera",
    "FreeSpace",
    "Scene",
    "choose_backend",
    "describe",
    "film",
    "intrinsics_of",
    "make_scene",
    "make_trajectory",
    "opencv_to_panda",
    "provenance_of",
    "shoot",
]

_HOMES = {
    "CLEARANCE": "space",
    "ENGINE": "recording",
    "Camera": "capture",
    "FreeSpace": "space",
    "Scene": "scenes",
    "choose_backend": "capture",
    "describe": "captions",
    "film": "recording",
    "intrinsics_of": "capture",
    "make_scene": "building",
    "make_trajectory": "trajectories",
    "opencv_to_panda": "capture",
    "provenance_of": "recording",
    "shoot": "capture",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
