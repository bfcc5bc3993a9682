"""Names in public Wan2.1 files: original and diffusers, the prefixes of wrappers, and how to tell other files
apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

from relic.nn.tensor_files import Stored, shortened

__all__ = ["Layout", "WanSizes", "layout_of", "sizes_of", "to_diffusers", "to_original", "unwrapped"]

Layout = Literal["original", "diffusers"]

# modules and bare parameters, original -> diffusers; no tensor changes its shape
GLOBAL = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
BLOCK = {
    "modulation": "scale_shift_table",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in ATTENTION.items()},
    "norm3": "norm2",  # the affine norm before cross-attention: diffusers counts in order of use
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
INVERSE_GLOBAL = {theirs: ours for ours, theirs in GLOBAL.items()}
INVERSE_BLOCK = {theirs: ours for ours, theirs in BLOCK.items()}
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

# what public Wan files of another kind have and text-to-video has not
EXTRAS = {
    r"(^|\.)img_emb\.|k_img\b|image_embedder\.|add_k_proj": "an image-to-video Wan checkpoint",
    r"^vace_": "a Wan VACE checkpoint",
    r"^control_adapter\.|^ref_conv\.": "a Wan Fun-Control checkpoint",
    r"\.lora_|\.lora\.": "a LoRA: adapters without the weights that they adapt; merge them first",
    r"scale_weight$|\.weight_scale|scale_input$": "a quantised checkpoint; take the weights it was made of",
}
# other files that people have beside a DiT
FOREIGN = {
    r"^(encoder\.downsamples|decoder\.upsamples)\.": "the Wan VAE (original names)",
    r"^(encoder\.down_blocks|decoder\.up_blocks)\.": "a diffusers VAE",
    r"^token_embedding\.|^shared\.weight$|^encoder\.block\.0\.layer\.": "a T5 text encoder",
    r"^(visual|vision_model)\.": "a CLIP image encoder",
    r"^(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.": (
        "a diffusion transformer of another family"
    ),
    r"\.lora_|\.lora\.": EXTRAS[r"\.lora_|\.lora\."],
}


class WanSizes(NamedTuple):
    """Sizes of a Wan DiT that can be read off its tensors."""

    width: int
    depth: int
    ffn: int
    latent_channels: int
    text_width: int
    freq_width: int

    @property
    def name(self) -> str:
        """Name of the public model of these sizes."""
        public = {
            (1536, 30, 16): "Wan2.1 T2V-1.3B",
            (5120, 40, 16): "Wan2.1 T2V-14B",
            (5120, 40, 36): "Wan2.1 I2V-14B (its input holds an image: 36 channels)",
            (3072, 30, 48): "Wan2.2 TI2V-5B",
        }
        return public.get((self.width, self.depth, self.latent_channels), "a Wan DiT of no public size")


def unwrapped(name: str) -> str:
    """Take off what FSDP, checkpointing, compilation and an outer `model.` have put before a name's parts."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("model.")


def to_original(name: str) -> str:
    """Return the original name of a diffusers name; one that has none is returned as it is."""
    return _renamed(name, INVERSE_GLOBAL, INVERSE_BLOCK) or name


def to_diffusers(name: str) -> str:
    """Return the diffusers name of an original name.

    Raises:
        ValueError: If it has none.
    """
    renamed = _renamed(name, GLOBAL, BLOCK)
    if renamed is None:
        raise ValueError(
            f"{name} has no name in diffusers' WanTransformer3DModel; only plain Wan weights have."
        )
    return renamed


def _renamed(name: str, table: Mapping[str, str], block_table: Mapping[str, str]) -> str | None:
    prefix = ""
    if match := IN_BLOCK.fullmatch(name):
        prefix, name, table = f"blocks.{match[1]}.", match[2], block_table
    if name in table:
        return prefix + table[name]
    module, _, leaf = name.rpartition(".")
    return f"{prefix}{table[module]}.{leaf}" if module in table and leaf in ("weight", "bias") else None


def layout_of(names: Collection[str], *, path: object) -> Layout:
    """Tell original from diffusers names (both unwrapped).

    Raises:
        ValueError: If they are not those of a text-to-video Wan DiT, with what they look like instead.
    """
    layout: Layout | None = None
    if any(re.match(r"blocks\.\d+\.self_attn\.q\.", name) for name in names):
        layout = "original"
    elif any(re.match(r"blocks\.\d+\.attn1\.to_q\.", name) for name in names):
        layout = "diffusers"
    for pattern, meaning in (FOREIGN if layout is None else EXTRAS).items():
        found = sorted(name for name in names if re.search(pattern, name))
        if found:
            raise ValueError(
                f"{path} looks like {meaning} ({found[0]}). Give a text-to-video Wan2.1 DiT, original or "
                "diffusers, or a file of relic's own."
            )
    if layout is None:
        raise ValueError(
            f"{path} holds {len(names)} tensors named {shortened(sorted(names), count=3)}, which is no "
            "Wan2.1 DiT: that has blocks.0.self_attn.q.weight, or blocks.0.attn1.to_q.weight from diffusers. "
            "Give the DiT's folder or file, or a file of relic's own."
        )
    return layout


def sizes_of(entries: Mapping[str, Stored]) -> WanSizes | None:
    """Read sizes off the tensors of a DiT (original names); None if one that is needed has not its shape."""
    shapes = {name: entry.shape for name, entry in entries.items()}
    patch = shapes.get("patch_embedding.weight", ())
    text = shapes.get("text_embedding.0.weight", ())
    time = shapes.get("time_embedding.0.weight", ())
    ffn = next((s for n, s in sorted(shapes.items()) if re.fullmatch(r"blocks\.\d+\.ffn\.0\.weight", n)), ())
    if len(patch) != 5 or not len(text) == len(time) == len(ffn) == 2:
        return None
    depth = 1 + max(int(match[1]) for name in shapes if (match := IN_BLOCK.fullmatch(name)))
    return WanSizes(patch[0], depth, ffn[0], patch[1], text[1], time[1])
