"""The clips that a callback owns: windows of a data set of recordings, or clips made elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning import LightningModule

from relic.data.clips import read_clips
from relic.types import Clip, ClipSpec

__all__ = ["Recordings", "clips_of"]


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """Windows of the held-out scenes of a data set, the same ones in every run.

    Args:
        root: Folder or fsspec URL of rendered or imported recordings (not encoded ones).
        num_frames: Frames per clip, 4k+1.
        split: Which scenes: `train`, `validation` or `evaluation`.
        num_clips: Number of clips.
        validation_scenes: Scenes held out for validation, as in the data module.
        evaluation_scenes: Scenes held out for evaluation, as in the data module.
        seed: Chooses the windows.
    """

    root: str
    num_frames: int
    split: Literal["train", "validation", "evaluation"] = "validation"
    num_clips: int = 2
    validation_scenes: int = 2
    evaluation_scenes: int = 2
    seed: int = 0


def clips_of(source: Recordings | Sequence[Clip], module: LightningModule) -> list[Clip]:
    """Return the clips of a callback, at the size of `module.clip` if that is a ClipSpec, else as stored.

    Raises:
        TypeError: If the module has no `generate`, or something else than clips was given.
        ValueError: If there is no clip.
    """
    if not callable(getattr(module, "generate", None)):
        raise TypeError(
            f"This callback needs a module with generate(clips, prefix_frames=, seed=); "
            f"{type(module).__name__} has none."
        )
    if isinstance(source, Recordings):
        settings: dict[str, Any] = vars(source)
        spec = getattr(module, "clip", None)  # in a foreign module that may be anything, a network too
        return read_clips(**settings, clip=spec if isinstance(spec, ClipSpec) else None)
    clips = list(source)
    if not clips:
        raise ValueError("The callback was given no clips: name a data set (Recordings), or a list of Clip.")
    for number, clip in enumerate(clips):
        if not isinstance(clip, Clip):
            raise TypeError(
                f"clip {number} of the callback is a {type(clip).__name__}; give relic.types.Clip, or name a "
                "data set: Recordings(root=..., num_frames=...)."
            )
    return clips
