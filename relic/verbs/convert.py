"""`relic convert`: weights between the layouts of public Wan2.1 and our own files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch

from relic.nn.checkpoints import WeightsSource, check_fit, own_header, write_weights
from relic.nn.denoiser import EulerSampler
from relic.nn.dit import DiT, DiTConfig
from relic.nn.eight_bits import FromEightBits
from relic.nn.tensor_files import Renamed, Tensors, shortened
from relic.nn.wan_keys import sizes_of
from relic.nn.wan_layout import (
    dtypes_in_words,
    find_weights,
    open_tensors,
    public_config,
    recognised,
    write_public,
)
from relic.types import ClipSpec

__all__ = ["convert"]

SHARD_GB = 10.0


def convert(
    src: str,
    *,
    out: str,
    to: Literal["original", "diffusers", "relic"],
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
    shard_gb: float | None = None,
    member: str | None = None,
) -> None:
    """Convert weights between public Wan2.1 layouts and relic's own files, tensor by tensor.

    Args:
        src: What to convert: the folder, safetensors file, index of shards or .pth file of a Wan2.1-T2V DiT,
            original or diffusers, or a file of relic's own.
        out: Where to: a new folder, or a new .safetensors file for `relic`.
        to: Layout of what is written. `relic` writes a teacher without camera control, to start from with
            `init.missing: [control]`.
        dtype: Dtype of what is written; keep leaves every tensor as it is, but for matrices in 8 bits, which
            become float32.
        shard_gb: Split folders into files of at most so many gigabytes; by default 10.
        member: Which network of a torch file with several, e.g. generator_ema of Self-Forcing.
    """
    target = Path(out)
    _check_target(target, to=to, shard_gb=shard_gb)
    path = find_weights(src)
    tensors = open_tensors(path, member=member)
    header = own_header(path, tensors)
    if header is None:
        checkpoint = recognised(path, tensors)
        found, tensors, config = f"{checkpoint.layout} layout", checkpoint.tensors, public_config(checkpoint)
        with torch.device("meta"):
            own = DiT(config).state_dict()
        check_fit(path, own, tensors.entries, source=WeightsSource(path=src))
    else:
        tensors = FromEightBits(tensors)
        found, config = f"a {header['kind']} of relic's own", _config_of(path, header)
    print(f"found    {path}")
    print(f"         {found}, {tensors.container}")
    for line in describe(tensors, config):
        print(line)
    cast = None if dtype == "keep" else getattr(torch, dtype)
    if to == "relic":
        if header is None:
            tensors = Renamed(tensors, {name: f"dit.{name}" for name in tensors.entries})
            header = {"kind": "teacher", "config": teacher_config(config)}
        write_weights(target, tensors, kind=header["kind"], config=header["config"], dtype=cast)
        written = [target]
    else:
        if header is not None:
            tensors = _dit_alone(path, tensors, layout=to)
        size = round((SHARD_GB if shard_gb is None else shard_gb) * 1e9)
        written = write_public(target, tensors, config=config, layout=to, dtype=cast, shard_bytes=size)
    gigabytes = sum(file.stat().st_size for file in written) / 1e9
    kept = "as it was" if cast is None else dtype
    print(f"wrote    {target}: {to}, {len(written)} file(s), {gigabytes:.3g} GB, dtype {kept}")


def _check_target(target: Path, *, to: str, shard_gb: float | None) -> None:
    if target.exists():
        raise FileExistsError(f"{target} exists; give another --out, or remove it.")
    if to == "relic" and target.suffix != ".safetensors":
        raise ValueError(f"out={target} must end in .safetensors: relic's weights are one file.")
    if to != "relic" and target.suffix == ".safetensors":
        raise ValueError(f"out={target} must be a folder: {to} weights have a config.json beside them.")
    if shard_gb is not None and to == "relic":
        raise ValueError(f"shard_gb={shard_gb} is for folders; relic's weights are one file. Leave it out.")
    if shard_gb is not None and shard_gb <= 0:
        raise ValueError(f"shard_gb={shard_gb} must be above 0, e.g. 10.")


def _config_of(path: Path, header: dict[str, Any]) -> DiTConfig:
    """Return the sizes of the DiT in a file of our own."""
    if "dit" not in header["config"]:
        raise ValueError(f"{path} holds a {header['kind']}, which has no DiT; only DiTs have other layouts.")
    return DiTConfig.from_dict(header["config"]["dit"])


def _dit_alone(path: Path, tensors: Tensors, *, layout: str) -> Tensors:
    beside = sorted(name for name in tensors.entries if not name.startswith("dit."))
    if beside:
        raise ValueError(
            f"{path} holds {shortened(beside)} beside the DiT, which the {layout} layout has no place for; "
            "keep it as a relic file."
        )
    return Renamed(tensors, {name: name.removeprefix("dit.") for name in tensors.entries})


def describe(tensors: Tensors, config: DiTConfig) -> list[str]:
    """Return lines on a network and its tensors."""
    entries = {name.removeprefix("dit."): entry for name, entry in tensors.entries.items()}
    sizes = sizes_of(entries)
    parameters = sum(entry.numel for entry in entries.values())
    return [
        f"network  {sizes.name if sizes else 'a DiT'}: width {config.width}, depth {config.depth}, heads "
        f"{config.heads}, ffn {config.ffn}, control {'yes' if config.control else 'no'}, rope_factor "
        f"{config.rope_factor:g}",
        f"tensors  {len(entries)}, {parameters:,} parameters, {dtypes_in_words(entries)}",
    ]


def teacher_config(config: DiTConfig) -> dict[str, Any]:
    """Return the header of a teacher that is a public model: its sizes, and how it was made to be sampled."""
    return {
        "dit": dataclasses.asdict(config),
        "words": None,
        "clip": dataclasses.asdict(ClipSpec()),
        "sampler": dataclasses.asdict(EulerSampler(guidance=5.0)),
    }
