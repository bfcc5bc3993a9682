"""Weights on disk: our own files, with a header that says what they are, and public Wan2.1 in any layout;
loading is strict and says what differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from relic.nn.control import ControlConfig
from relic.nn.dit import DiTConfig
from relic.nn.eight_bits import FromEightBits
from relic.nn.placing import fresh_values, place
from relic.nn.tensor_files import (
    Renamed,
    SafetensorsFiles,
    Stored,
    Tensors,
    TensorsInMemory,
    read_entries,
    shortened,
)
from relic.nn.tensor_writer import open_writer
from relic.nn.wan_keys import WanSizes, sizes_of
from relic.nn.wan_layout import find_weights, open_tensors, recognised

__all__ = [
    "WeightsSource",
    "check_fit",
    "check_source",
    "file_sha256",
    "load_weights",
    "own_header",
    "read_header",
    "save_weights",
    "write_weights",
]

FORMAT = "relic-weights/1"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """Weights to start from. (To resume a run is another thing: `--ckpt_path`.)

    Args:
        path: A safetensors file written by an earlier stage; or public Wan2.1-T2V weights, original or
            diffusers: their folder, safetensors file, index of shards, or .pth file. What it is, is read off
            the file.
        rope_factor: `match` refuses weights trained at another YaRN factor; `restate` takes them over to this
            network's factor (the step from one horizon to the next).
        missing: Modules whose parameters the file may lack, at any depth: `control` when starting from public
            weights, or a longer name like `dit.blocks.3`. They start as in a fresh network.
        member: Which network of a torch file with several, e.g. `generator_ema` of Self-Forcing.
    """

    path: str
    rope_factor: Literal["match", "restate"] = "match"
    missing: tuple[str, ...] = ()
    member: str | None = None

    def may_lack(self, name: str) -> bool:
        """Whether `missing` names a parameter, or a module that it is in."""
        return any(f".{module}." in f".{name}." for module in self.missing)


def save_weights(path: Path, tensors: Mapping[str, Tensor], *, kind: str, config: Mapping[str, Any]) -> None:
    """Write tensors with a header (format, kind, config) to `path`, whole or not at all."""
    write_weights(path, TensorsInMemory(tensors), kind=kind, config=config)


def write_weights(
    path: Path, tensors: Tensors, *, kind: str, config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write tensors one by one as `save_weights` does; dtype: of floats in the file, None keeps theirs."""
    entries = {
        name: Stored(e.shape, dtype if dtype and e.dtype.is_floating_point else e.dtype)
        for name, e in tensors.entries.items()
    }
    # one entry only: with several, their order, and so the file's hash, differs from run to run
    header = {"relic": json.dumps({"format": FORMAT, "kind": kind, "config": config}, sort_keys=True)}
    with open_writer(path, entries, metadata=header) as writer:
        for name, read in tensors.stream():
            writer.write(name, read(None))


def read_header(path: str | Path, *, kind: str | None = None) -> dict[str, Any]:
    """Return {"kind", "config"} of a weights file of our own.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another format, or of another kind than asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No weights at {path}; fit the stage that writes them first.")
    _, metadata = read_entries(path)
    return _parsed_header(path, metadata, kind=kind)


def own_header(
    path: Path, tensors: Tensors, *, kind: str | Sequence[str] | None = None
) -> dict[str, Any] | None:
    """Return the header of an opened file as `read_header` does, or None if it is not one of our own."""
    if isinstance(tensors, SafetensorsFiles) and "relic" in tensors.metadata:
        return _parsed_header(path, tensors.metadata, kind=kind)
    return None


def _parsed_header(
    path: Path, metadata: Mapping[str, str], *, kind: str | Sequence[str] | None
) -> dict[str, Any]:
    header = json.loads(metadata.get("relic", "{}"))
    if header.get("format") != FORMAT:
        found = header.get("format", "no format")
        raise ValueError(
            f"{path} says {found!r}, this version reads {FORMAT!r}; export it again, or, if it is of public "
            "weights, convert it: relic convert."
        )
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds is not None and header["kind"] not in kinds:
        raise ValueError(f"{path} holds a {header['kind']}, but a {' or a '.join(kinds)} is needed.")
    return {"kind": header["kind"], "config": header["config"]}


def check_source(source: WeightsSource, *, kind: str | Sequence[str]) -> None:
    """Look at the headers of weights, before time is spent on them. kind: of our own, or any of several.

    Raises:
        FileNotFoundError, ValueError: If files are missing or damaged, or hold something else.
    """
    _open(source, kind=kind)


class _Opened(NamedTuple):
    """Weights not yet read: file, tensors, and what no shape tells, as far as the file does.

    stated: by the names of `DiTConfig`. alone: whether the tensors are those of the DiT alone, as in public
        files.
    """

    path: Path
    tensors: Tensors
    stated: Mapping[str, Any]
    alone: bool


def _open(source: WeightsSource, *, kind: str | Sequence[str]) -> _Opened:
    path = find_weights(source.path)
    tensors = open_tensors(path, member=source.member)
    header = own_header(path, tensors, kind=kind)
    if header is not None:
        return _Opened(path, FromEightBits(tensors), header["config"].get("dit", {}), alone=False)
    checkpoint = recognised(path, tensors)
    heads = {} if checkpoint.heads is None else {"heads": checkpoint.heads}
    return _Opened(path, checkpoint.tensors, {"rope_factor": 1.0, **heads}, alone=True)


def load_weights(
    module: nn.Module,
    source: WeightsSource,
    *,
    kind: str | Sequence[str],
    device: torch.device | str | None = None,
) -> None:
    """Load weights into `module`, strictly, tensor by tensor; each is cast to its parameter's dtype.

    A module built on the meta device gets its memory here, on `device`; a sharded one keeps its sharding, and
    each rank reads its own part. Parameters that the source may lack keep their values, or are drawn by the
    module's `reset_parameters` if it is on the meta device.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: With every missing, unexpected and mis-shaped key and what the file is instead; or if it
            is damaged, quantised, or was trained at another YaRN factor.
    """
    opened = _open(source, kind=kind)
    tensors = opened.tensors
    if opened.alone and hasattr(module, "dit"):
        tensors = Renamed(tensors, {name: f"dit.{name}" for name in tensors.entries})
    own = module.state_dict()
    check_fit(opened.path, own, tensors.entries, source=source)
    _check_meaning(module, opened, source)
    lacking = sorted(name for name in own.keys() - tensors.entries.keys() if own[name].is_meta)
    if lacking:
        place(module, fresh_values(module, lacking), device=device)
    place(module, tensors, device=device)
    left = [name for name, p in (*module.named_parameters(), *module.named_buffers()) if p.is_meta]
    if left:
        raise ValueError(
            f"{shortened(left)} stay on the meta device, since no file ever holds them; build them in memory."
        )


def check_fit(
    path: Path, own: Mapping[str, Tensor], entries: Mapping[str, Stored], *, source: WeightsSource
) -> None:
    """Compare names, shapes and dtypes of a file with a network's state.

    Raises:
        ValueError: With every difference that `source` does not allow, and what the file is instead.
    """
    missing = sorted(k for k in own.keys() - entries.keys() if not source.may_lack(k))
    unexpected = sorted(entries.keys() - own.keys())
    shapes = [
        f"{k}: {entries[k].shape} in the file, {tuple(own[k].shape)} here"
        for k in sorted(own.keys() & entries.keys())
        if entries[k].shape != tuple(own[k].shape)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if not any(problems.values()):
        _check_dtypes(path, own, entries)
        return
    lines = [f"{len(v)} {name}: {shortened(v)}" for name, v in problems.items() if v]
    hint = _size_hint(own, entries) or _missing_hint(missing)
    raise ValueError("\n  ".join([f"{path} does not fit this network.", *hint, *lines]))


def _size_hint(own: Mapping[str, Tensor], entries: Mapping[str, Stored]) -> list[str]:
    """Say whose sizes the file has, if they are another network's."""
    here = sizes_of({k.removeprefix("dit."): Stored(tuple(v.shape), v.dtype) for k, v in own.items()})
    there = sizes_of({k.removeprefix("dit."): entry for k, entry in entries.items()})
    if here is None or there is None or here == there:
        return []
    differing = [
        f"{name} {getattr(there, name)} in the file, {getattr(here, name)} here"
        for name in WanSizes._fields
        if getattr(there, name) != getattr(here, name)
    ]
    meaning = "It has other sizes"
    if here.name != there.name:
        meaning = f"It looks like {there.name}, while this network is {here.name}"
    return [
        f"{meaning}: {'; '.join(differing)}.",
        "Set net to the sizes of the file, or give weights of this size.",
    ]


def _missing_hint(missing: Sequence[str]) -> list[str]:
    fresh = [part for part in ("control", "words") if any(f".{part}." in f".{k}." for k in missing)]
    known = [k for k in missing if any(f".{part}." in f".{k}." for part in fresh)]
    if not missing or len(known) < len(missing):
        return []
    return [f"To start without these, set init.missing: [{', '.join(fresh)}]."]


def _check_dtypes(path: Path, own: Mapping[str, Tensor], entries: Mapping[str, Stored]) -> None:
    wrong = [
        f"{k}: {entries[k].dtype} in the file, {own[k].dtype} here"
        for k in sorted(own.keys() & entries.keys())
        if entries[k].dtype != own[k].dtype
        and not (entries[k].dtype in FLOATS and own[k].dtype.is_floating_point)
    ]
    if wrong:
        raise ValueError(
            f"{path} holds {len(wrong)} tensors of a dtype that cannot be cast without its scales: "
            f"{shortened(wrong)}. Give the float32, bfloat16 or float16 weights that they were made from."
        )


def _check_meaning(module: nn.Module, opened: _Opened, source: WeightsSource) -> None:
    """Compare what weights were trained with and no shape tells."""
    own = getattr(getattr(module, "dit", module), "config", None)
    if not isinstance(own, DiTConfig):
        return
    path, stated = opened.path, opened.stated
    for name in ("heads", "text_length", "eps"):
        if name in stated and stated[name] != getattr(own, name):
            raise ValueError(
                f"{path} was trained with {name}={stated[name]}, this network has {getattr(own, name)}; set "
                f"net.{name} to {stated[name]}."
            )
    if own.control is not None and own.control.rays and not stated.get("control"):
        raise ValueError(
            f"{path} was trained without camera control; with control.rays a network would compute something "
            "else from the start. Set net.control.rays to 0 to start from it."
        )
    if own.control is not None and stated.get("control"):
        theirs, ours = ControlConfig(**stated["control"]), own.control
        for name in ("rays", "inverse_depths"):
            there, here = getattr(theirs, name), getattr(ours, name)
            told = list(there) if isinstance(there, tuple) else there
            if there != here and (name == "rays" or ours.rays):
                raise ValueError(
                    f"{path} was trained with control.{name}={there}, this network has {here}: its tokens "
                    f"look elsewhere. Set net.control.{name} to {told}."
                )
    factor = stated.get("rope_factor", own.rope_factor)
    if factor != own.rope_factor and source.rope_factor == "match":
        raise ValueError(
            f"{path} was trained at rope_factor={factor}, this network has {own.rope_factor}: "
            "positions mean something else to it. Set init.rope_factor: restate to take the weights over "
            "on purpose."
        )


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, which names the weights in it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
