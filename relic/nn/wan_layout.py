"""Public checkpoints on disk: find their files, say what they are, write them in either layout."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relic.nn.dit import DiTConfig
from relic.nn.tensor_files import (
    INDEX,
    Renamed,
    SafetensorsFiles,
    Stored,
    Tensors,
    TensorsInMemory,
    load_torch_dict,
    read_config,
    shortened,
)
from relic.nn.tensor_writer import write_shards
from relic.nn.wan_keys import Layout, WanSizes, layout_of, sizes_of, to_diffusers, to_original, unwrapped

__all__ = ["Checkpoint", "find_weights", "open_checkpoint", "open_tensors", "public_config", "write_public"]

STEM = "diffusion_pytorch_model"
TORCH = (".pth", ".pt", ".bin")
PUBLIC_HEAD_WIDTH = 128


@dataclass(frozen=True)
class Checkpoint:
    """A DiT of public weights, not yet read.

    path: the file that was found; layout: whose names it has; tensors: what it holds, under original names;
        config: its config.json, or None.
    """

    path: Path
    layout: Layout
    tensors: Tensors
    config: Mapping[str, Any] | None

    @property
    def sizes(self) -> WanSizes | None:
        return sizes_of(self.tensors.entries)

    @property
    def heads(self) -> int | None:
        """Attention heads that its config.json says."""
        config = self.config or {}
        return config.get("num_attention_heads" if self.is_diffusers_config else "num_heads")

    @property
    def is_diffusers_config(self) -> bool:
        return (self.config or {}).get("_class_name") == "WanTransformer3DModel"


def find_weights(path: str | Path) -> Path:
    """Return the one file that names all weights of `path`: an index of shards, safetensors or torch.

    A folder may be that of a DiT, or a diffusers pipeline with its `transformer/`.

    Raises:
        FileNotFoundError: If there is nothing there, or no weights.
        ValueError: If a folder holds several that could be meant, or shards without their index.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"No weights at {path}; fit the stage that writes them first, or give a checkpoint's file or "
            "folder."
        )
    if (path / "transformer_2").is_dir():
        raise ValueError(
            f"{path} is a pipeline of two networks (Wan2.2): transformer and transformer_2, for high and low "
            "noise. Give the path of one of them."
        )
    if (path / "transformer").is_dir():
        return find_weights(path / "transformer")
    indices, files = sorted(path.glob(f"*{INDEX}")), sorted(path.glob("*.safetensors"))
    for name in (f"{STEM}{INDEX}", f"{STEM}.safetensors"):
        if (path / name) in (*indices, *files):
            return path / name
    found = indices or files
    if len(found) == 1 and "-of-" not in found[0].name:
        return found[0]
    if not found:
        beside = sorted(p.name for p in path.iterdir() if p.suffix in TORCH)
        hint = f"It holds {shortened(beside)}: give that file itself." if beside else "Give a DiT's folder."
        raise FileNotFoundError(f"{path} holds no *.safetensors. {hint}")
    names = shortened([p.name for p in found])
    if indices or not all("-of-" in p.name for p in found):
        raise ValueError(f"{path} holds several weights: {names}. Give the path of one of them.")
    raise ValueError(
        f"{path} holds {len(found)} shards ({names}) without their *{INDEX}, which says whether that is all "
        "of them. Copy the index there."
    )


def open_tensors(path: Path, *, member: str | None) -> Tensors:
    """Open a file that `find_weights` found.

    member: which of the networks of a torch file with several, e.g. generator_ema of Self-Forcing.

    Raises:
        ValueError: If it is damaged, or `member` is needed, or names none of its networks.
    """
    if path.suffix not in TORCH:
        if not path.name.endswith((".safetensors", INDEX)):
            raise ValueError(
                f"{path} is none of .safetensors, *{INDEX}, {', '.join(TORCH)}"
                + ("; a checkpoint to resume goes to --ckpt_path." if path.suffix == ".ckpt" else ".")
            )
        if member is not None:
            raise ValueError(f"member={member!r} is for torch files of several networks; {path} has one.")
        return SafetensorsFiles(path)
    content = load_torch_dict(path)
    if "pytorch-lightning_version" in content:
        raise ValueError(
            f"{path} is a Lightning checkpoint, which a run is resumed from (--ckpt_path); to start from "
            "weights give the safetensors file that the stage wrote at its end."
        )
    members = {
        str(key): value
        for key, value in content.items()
        if isinstance(value, Mapping) and any(isinstance(t, Tensor) for t in value.values())
    }
    if not members:
        if member is not None:
            raise ValueError(f"member={member!r} is for torch files of several networks; {path} has one.")
        return TensorsInMemory(_only_tensors(path, content), container="a torch file")
    if member is None and len(members) > 1:
        raise ValueError(
            f"{path} holds {len(members)} networks: {', '.join(members)}. Set member to one of them."
        )
    name = next(iter(members)) if member is None else member
    if name not in members:
        raise ValueError(f"member={name!r} is not in {path}; it holds {', '.join(members)}.")
    return TensorsInMemory(_only_tensors(path, members[name]), container=f"{name} of a torch file")


def _only_tensors(path: Path, content: Mapping[str, Any]) -> Mapping[str, Tensor]:
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        raise ValueError(
            f"{path} must hold a dict of tensors; {shortened(others) or 'it is empty'} is none. Save the "
            "network's state dict alone."
        )
    return content


def open_checkpoint(path: str | Path, *, member: str | None = None) -> Checkpoint:
    """Open a public DiT in whatever layout; only headers are read.

    Raises:
        FileNotFoundError, ValueError: If files are missing or damaged, or it is something else.
    """
    found = find_weights(path)
    return recognised(found, open_tensors(found, member=member))


def recognised(path: Path, files: Tensors) -> Checkpoint:
    """Say what the tensors of a public file are.

    Raises:
        ValueError: If they are no text-to-video Wan2.1 DiT, or two have one name.
    """
    names = {stored: unwrapped(stored) for stored in files.entries}
    layout = layout_of(names.values(), path=path)
    if layout == "diffusers":
        names = {stored: to_original(name) for stored, name in names.items()}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f"{path} holds {len(twice)} tensors twice, with and without a wrapper's prefix: "
            f"{shortened(twice)}. Save one network's state dict alone."
        )
    config = read_config(path.parent)
    if config is not None and config.get("_class_name") not in ("WanModel", "WanTransformer3DModel"):
        config = None  # another network's, that happens to lie beside a single file
    return Checkpoint(path, layout, Renamed(files, names), config)


def public_config(checkpoint: Checkpoint) -> DiTConfig:
    """Return the sizes of a public DiT, from its tensors and, where they cannot tell, its config.json.

    Raises:
        ValueError: If the two differ, or the head count is said nowhere.
    """
    sizes, config = checkpoint.sizes, checkpoint.config or {}
    if sizes is None:
        raise ValueError(
            f"{checkpoint.path} lacks a tensor that tells its sizes (patch_embedding.weight, "
            "text_embedding.0.weight, time_embedding.0.weight, blocks.*.ffn.0.weight). Copy it again."
        )
    theirs, heads = checkpoint.is_diffusers_config, checkpoint.heads
    said = {
        "width": config.get("dim"),
        "depth": config.get("num_layers"),
        "ffn": config.get("ffn_dim"),
        "latent_channels": config.get("in_channels" if theirs else "in_dim"),
        "text_width": config.get("text_dim"),
        "freq_width": config.get("freq_dim"),
    }
    if theirs and heads is not None:
        said["width"] = heads * config.get("attention_head_dim", PUBLIC_HEAD_WIDTH)
    for name, value in said.items():
        if value is not None and value != getattr(sizes, name):
            raise ValueError(
                f"config.json beside {checkpoint.path} says {name}={value}, the tensors have "
                f"{getattr(sizes, name)}. Copy both from one place."
            )
    if heads is None:
        heads, rest = divmod(sizes.width, PUBLIC_HEAD_WIDTH)
        if rest:
            raise ValueError(
                f"{checkpoint.path} has no config.json and width {sizes.width}, which is no multiple of "
                f"{PUBLIC_HEAD_WIDTH}, the head width of all public models. Put a config.json with num_heads "
                "beside it."
            )
    return DiTConfig(
        **sizes._asdict(),
        heads=heads,
        eps=config.get("eps", 1e-6),
        text_length=config.get("text_len", 512),
        control=None,
    )


def config_json(config: DiTConfig, *, layout: Layout) -> dict[str, Any]:
    """Return what config.json of a layout says of a network without control."""
    if layout == "diffusers":
        return {
            "_class_name": "WanTransformer3DModel",
            "_diffusers_version": "0.33.0",
            "patch_size": [1, 2, 2],
            "num_attention_heads": config.heads,
            "attention_head_dim": config.head_width,
            "in_channels": config.latent_channels,
            "out_channels": config.latent_channels,
            "text_dim": config.text_width,
            "freq_dim": config.freq_width,
            "ffn_dim": config.ffn,
            "num_layers": config.depth,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": config.eps,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "rope_max_seq_len": 1024,
        }
    public = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.width,
        "eps": config.eps,
        "ffn_dim": config.ffn,
        "freq_dim": config.freq_width,
        "in_dim": config.latent_channels,
        "model_type": "t2v",
        "num_heads": config.heads,
        "num_layers": config.depth,
        "out_dim": config.latent_channels,
        "text_len": config.text_length,
    }
    # public files leave 4096 out
    return public if config.text_width == 4096 else {**public, "text_dim": config.text_width}


def write_public(
    folder: Path,
    tensors: Tensors,
    *,
    config: DiTConfig,
    layout: Layout,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 10_000_000_000,
) -> list[Path]:
    """Write a DiT (original names) into a new folder as public files: config.json and one file or shards.

    dtype: of what is written; None keeps each tensor's own.

    Raises:
        FileExistsError: If the folder exists.
        ValueError: If the network has control or a YaRN factor, which these layouts cannot say.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give a new folder, or remove it.")
    if config.control is not None or config.rope_factor != 1.0:
        said = "camera control" if config.control is not None else f"rope_factor={config.rope_factor}"
        raise ValueError(
            f"The network has {said}, which the {layout} layout has no words for; keep it as a relic file."
        )
    rename = to_diffusers if layout == "diffusers" else str
    entries = {
        rename(name): Stored(e.shape, dtype if dtype and e.dtype.is_floating_point else e.dtype)
        for name, e in tensors.entries.items()
    }

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, part in tensors.stream():
            yield rename(name), part(None)

    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        text = json.dumps(config_json(config, layout=layout), indent=2, sort_keys=True)
        (partial / "config.json").write_text(text + "\n")
        files = write_shards(partial, entries, read(), stem=STEM, shard_bytes=shard_bytes)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / file.name for file in files]


def dtypes_in_words(entries: Mapping[str, Stored]) -> str:
    """Return the dtypes of tensors, the most frequent first."""
    counts = Counter(str(entry.dtype).removeprefix("torch.") for entry in entries.values())
    return ", ".join(name if len(counts) == 1 else f"{n} {name}" for name, n in counts.most_common())
