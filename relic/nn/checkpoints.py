"""Weights on disk: safetensors with a header that says what they are; loading is strict and says what
differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["WeightsSource", "file_sha256", "load_weights", "read_header", "save_weights"]

FORMAT = "relic-weights/1"


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """Weights to start from. (To resume a run is another thing: `--ckpt_path`.)

    Args:
        path: A safetensors file written by an earlier stage.
        rope_factor: `match` refuses weights trained at another YaRN factor; `restate` takes them over to this
            network's factor (the step from one horizon to the next).
        missing: Prefixes of parameters that the file may lack, `*` for any part of a name; they keep their
            initial values. `relic.nn.control.CONTROL_KEYS` starts a network with control from a plain one.
    """

    path: str
    rope_factor: Literal["match", "restate"] = "match"
    missing: tuple[str, ...] = ()


def save_weights(path: Path, tensors: Mapping[str, Tensor], *, kind: str, config: Mapping[str, Any]) -> None:
    """Write tensors with a header (format, kind, config) to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # one entry only: with several, their order, and so the file's hash, differs from run to run
    header = {"relic": json.dumps({"format": FORMAT, "kind": kind, "config": config}, sort_keys=True)}
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata=header)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_header(path: str | Path, *, kind: str | None = None) -> dict[str, Any]:
    """Return {"kind", "config"} of a weights file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another format, or of another kind than asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No weights at {path}; fit the stage that writes them first.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("relic", "{}"))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); write or copy it again."
        ) from error
    if header.get("format") != FORMAT:
        found = header.get("format", "no format")
        raise ValueError(f"{path} says {found!r}, this version reads {FORMAT!r}; export it again.")
    if kind is not None and header["kind"] != kind:
        raise ValueError(f"{path} holds a {header['kind']}, but a {kind} is needed.")
    return {"kind": header["kind"], "config": header["config"]}


def load_weights(module: nn.Module, source: WeightsSource, *, kind: str) -> None:
    """Load a file into `module`, strictly.

    Raises:
        ValueError: With every missing, unexpected and mis-shaped key, or both YaRN factors if they differ.
    """
    header = read_header(source.path, kind=kind)
    _check_rope_factor(module, header["config"], source)
    with safe_open(source.path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    own = module.state_dict()
    missing = sorted(k for k in own.keys() - tensors.keys() if not _may_lack(source, k))
    unexpected = sorted(tensors.keys() - own.keys())
    shapes = [
        f"{k}: {tuple(tensors[k].shape)} in the file, {tuple(own[k].shape)} here"
        for k in sorted(own.keys() & tensors.keys())
        if tensors[k].shape != own[k].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(problems.values()):
        lines = [
            f"{len(v)} {name}: {', '.join(v[:5])}{' ...' if len(v) > 5 else ''}"
            for name, v in problems.items()
            if v
        ]
        raise ValueError(f"{source.path} does not fit this network.\n  " + "\n  ".join(lines))
    module.load_state_dict(tensors, strict=not source.missing)


def _may_lack(source: WeightsSource, key: str) -> bool:
    return any(fnmatchcase(key, f"{prefix}*") for prefix in source.missing)


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _check_rope_factor(module: nn.Module, config: Mapping[str, Any], source: WeightsSource) -> None:
    own = getattr(getattr(module, "dit", None), "config", None)
    if own is None or source.rope_factor == "restate":
        return
    stored = config["dit"]["rope_factor"]
    if stored != own.rope_factor:
        raise ValueError(
            f"{source.path} was trained at rope_factor={stored}, this network has {own.rope_factor}: "
            "positions mean something else to it. Set init.rope_factor: restate to take the weights over "
            "on purpose."
        )


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, which names the weights in it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
