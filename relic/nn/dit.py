"""The diffusion transformer: Wan2.1's architecture and key names, per-latent noise levels, camera control.

One class at every size; direction (bidirectional or causal) is what it is given to attend to, not a subclass.
Tokens are kept as (b, t, s, d): latent frame, place in the frame (row, then column), width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from relic.nn.attention import attend
from relic.nn.context import KV, Context, Fresh, FreshKV, LayerContext, Prompt, Rays, Turns
from relic.nn.control import BlockControl, ControlConfig, ControlEncoders, ControlStates
from relic.nn.norms import LayerNorm, RMSNorm, modulate
from relic.ops.flow import timestep_of
from relic.ops.rope import composed, grid_table, turn_heads
from relic.types import PATCH, Controls

__all__ = ["DiT", "DiTConfig"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a DiT.

    Args:
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads; they divide `width`.
        ffn: Hidden width of the feed-forward layers.
        latent_channels: Channels of the VAE's latents.
        text_width: Width of the prompt embeddings (4096 for umT5-XXL; the word table's width in small
            worlds).
        text_length: Prompt rows; shorter prompts are padded with zero rows, which are attended to, as in
            Wan2.1.
        freq_width: Width of the sinusoid of the noise level.
        eps: Epsilon of all norms.
        rope_factor: YaRN factor of the time axis, latents of the longest horizon / 21. It belongs to the
            weights.
        control: Sizes of the camera control, or null for a network without it (plain Wan2.1).
    """

    width: int
    depth: int
    heads: int
    ffn: int
    latent_channels: int = 16
    text_width: int = 4096
    text_length: int = 512
    freq_width: int = 256
    eps: float = 1e-6
    rope_factor: float = 1.0
    control: ControlConfig | None = field(default_factory=ControlConfig)

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width={self.width} must be heads={self.heads} times an even head width.")
        if self.rope_factor < 1.0:
            raise ValueError(
                f"rope_factor={self.rope_factor} must be at least 1 (latents / 21, or 1 up to 21 latents)."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiTConfig:
        """Rebuild the sizes from a file's header."""
        control = values["control"]
        return cls(**{**values, "control": ControlConfig(**control) if control else None})

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @classmethod
    def tiny(cls, **changes: object) -> DiTConfig:
        """10.5 M parameters with a word table for text: a small world, fitted in minutes on a GPU. Without
        rays, which belong to a picture's view.
        """
        sizes = {"width": 256, "depth": 8, "heads": 4, "ffn": 1024, "text_width": 64, "text_length": 32}
        return cls(**{**sizes, "control": ControlConfig(width=64), **changes})  # type: ignore[arg-type]

    @classmethod
    def wan_1b(cls, **changes: object) -> DiTConfig:
        """Wan2.1-T2V-1.3B."""
        return cls(**{"width": 1536, "depth": 30, "heads": 12, "ffn": 8960, **changes})  # type: ignore[arg-type]

    @classmethod
    def wan_14b(cls, **changes: object) -> DiTConfig:
        """Wan2.1-T2V-14B."""
        return cls(**{"width": 5120, "depth": 40, "heads": 40, "ffn": 13824, **changes})  # type: ignore[arg-type]


class Attention(nn.Module):
    """Projections and QK-norm, for self-attention and for cross-attention to text."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width)
        self.k = nn.Linear(config.width, config.width)
        self.v = nn.Linear(config.width, config.width)
        self.o = nn.Linear(config.width, config.width)
        self.norm_q = RMSNorm(config.width, eps=config.eps)
        self.norm_k = RMSNorm(config.width, eps=config.eps)

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (k d) -> b k n d", k=self.heads)

    def merge(self, x: Tensor) -> Tensor:
        return self.o(rearrange(x, "b k n d -> b n (k d)"))


class SelfAttention(Attention):
    def forward(
        self,
        x: Tensor,
        *,
        rope: Tensor,
        to_q: Tensor | None,
        to_k: Tensor | None,
        rays: Rays | None,
        memory: LayerContext | None = None,
    ) -> tuple[Tensor, FreshKV | None]:
        """x: (b, t, s, d); rope: table of the tokens, (t·s, 2, d), with rays (b, z, t·s, 2, d); to_q, to_k:
        pose embeddings (b, t, 1, d), or None; rays: their tables, or None.

        Without a memory the tokens attend to each other. Returns with it the fresh keys and values it asks
        for.
        """
        latents = x.shape[1]
        q, k, v = self.q(x), self.k(x), self.v(x)
        if to_q is not None and to_k is not None:
            q, k = q + to_q, k + to_k
        q, k, v = (rearrange(y, "b t s d -> b (t s) d") for y in (q, k, v))
        q, k, v = self.split(self.norm_q(q)), self.split(self.norm_k(k)), self.split(v)
        fresh: FreshKV | None = None
        if memory is None:
            k, v = Turns.of_tokens(rope, rays)(KV(k, v))
            out = attend(turn_heads(q, rope).to(v.dtype), k.to(v.dtype), v)
        else:
            out, fresh = memory(q, k, v, rope=rope, rays=rays)
        if rays is not None:
            out = turn_heads(out, rays[1], back=True)
        return rearrange(self.merge(out), "b (t s) d -> b t s d", t=latents), fresh


class CrossAttention(Attention):
    def forward(self, x: Tensor, text: Tensor | KV) -> Tensor:
        """x: (b, t, s, d); text: (b, n, d), or what `read` made of it."""
        q = self.split(self.norm_q(rearrange(self.q(x), "b t s d -> b (t s) d")))
        k, v = self.read(text) if isinstance(text, Tensor) else text
        out = self.merge(attend(q.to(v.dtype), k.to(v.dtype), v, parts=x.shape[1]))
        return rearrange(out, "b (t s) d -> b t s d", t=x.shape[1])

    def read(self, text: Tensor) -> KV:
        """Return the keys and values of a prompt (b, n, d). Padded rows are attended to: the public weights
        expect it.
        """
        return KV(self.split(self.norm_k(self.k(text))), self.split(self.v(text)))


class Block(nn.Module):
    """Self-attention (gated), action, cross-attention, feed-forward (gated)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 6, config.width))
        self.norm1 = LayerNorm(config.width, eps=config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(config.width, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(config.width, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.width, config.ffn),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn, config.width),
        )
        self.control = BlockControl(config.control, width=config.width) if config.control else None

    def forward(
        self,
        x: Tensor,
        *,
        levels: Tensor,
        rope: Tensor,
        text: Tensor | KV,
        control: ControlStates | None,
        dtype: torch.dtype,
        memory: LayerContext | None = None,
    ) -> tuple[Tensor, FreshKV | None]:
        """x: (b, t, s, d) residual stream; levels: (b, t, 6, d) from the noise levels; text: (b, n, d);
        dtype: what matrix products compute in.

        Returns x and the fresh keys and values, if `memory` asks for them.
        """
        m = (self.modulation[:, None] + levels).to(x.dtype)[:, :, :, None].unbind(2)  # six of (b, t, 1, d)
        to_q, to_k, rays = None, None, None
        if self.control is not None and control is not None:
            (to_q, to_k), rays = self.control.address(control), control.rays
        h = modulate(self.norm1(x), shift=m[0], scale=m[1]).to(dtype)
        attended, fresh = self.self_attn(h, rope=rope, to_q=to_q, to_k=to_k, rays=rays, memory=memory)
        x = torch.addcmul(x, attended, m[2]).to(x.dtype)
        if self.control is not None and control is not None:
            x = x + self.control.action(control.action)[:, :, None].to(x.dtype)
        x = (x + self.cross_attn(self.norm3(x).to(dtype), text)).to(x.dtype)
        h = modulate(self.norm2(x), shift=m[3], scale=m[4]).to(dtype)
        return torch.addcmul(x, self.ffn(h), m[5]).to(x.dtype), fresh

    def read(self, text: Tensor) -> KV:
        """Return a prompt (b, n, d) as this block reads it."""
        return self.cross_attn.read(text)


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 2, config.width))
        self.norm = LayerNorm(config.width, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.width, PATCH * PATCH * config.latent_channels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """x: (b, t, s, d); level: (b, t, d), the noise embedding before its projection."""
        shift, scale = (self.modulation[:, None] + level[:, :, None])[:, :, :, None].unbind(2)
        return self.head(modulate(self.norm(x), shift=shift, scale=scale).to(self.head.weight.dtype))


class DiT(nn.Module):
    """Predict velocity from noisy latents.

    The parameters of a network with `control=None` carry exactly the key names of the public Wan2.1-T2V
    files. `residual` is the dtype of the residual stream, set by `relic.parallel.apply_compute`: float32, as
    in the public code, holds parity with it; bfloat16 halves the traffic of all but the matrix products.
    """

    residual: torch.dtype = torch.float32

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embedding = nn.Conv3d(config.latent_channels, width, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)
        self.control: ControlEncoders | None = None
        if config.control is not None:
            self.control = ControlEncoders(config.control, heads=config.heads, head_width=config.head_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights as Wan2.1 does; control outputs and the velocity head start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                module.reset_parameters()
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        if self.patch_embedding.bias is not None:
            nn.init.zeros_(self.patch_embedding.bias)
        for name, parameter in self.named_parameters():
            if name.startswith(("text_embedding", "time_embedding")) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("modulation"):
                nn.init.normal_(parameter, std=self.config.width**-0.5)
        for module in self.modules():
            if isinstance(module, BlockControl):
                module.reset_parameters()
        nn.init.zeros_(self.head.head.weight)

    @overload
    def forward(
        self, latents: Tensor, *, sigma: Tensor, text: Tensor | Prompt, controls: Controls | None = None,
        start: int = 0, memory: None = None,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, latents: Tensor, *, sigma: Tensor, text: Tensor | Prompt, controls: Controls | None = None,
        memory: Context,
    ) -> tuple[Tensor, Fresh]: ...  # fmt: skip

    def forward(
        self,
        latents: Tensor,
        *,
        sigma: Tensor,
        text: Tensor | Prompt,
        controls: Controls | None = None,
        start: int = 0,
        memory: Context | None = None,
    ) -> Tensor | tuple[Tensor, Fresh]:
        """Return the velocity (b, t, c, h, w) of noisy latents of the same shape.

        With a memory, return the fresh keys and values of all layers as well, empty unless it asks for them.

        sigma: (b, t), one noise level per latent frame; text: (b, n <= text_length, text_width), or a prompt
            that was read before; controls: of the pixel frames these latents stand for; start: index of the
            first latent frame in its clip, which a memory knows by itself.

        Raises:
            ValueError: If the latents don't divide into patches, or the shapes don't belong together.
        """
        rows, columns = latents.shape[3] // PATCH, latents.shape[4] // PATCH
        if latents.shape[3] % PATCH or latents.shape[4] % PATCH:
            raise ValueError(
                f"latents of {tuple(latents.shape[3:])} don't divide into {PATCH}x{PATCH} patches."
            )
        if sigma.shape != latents.shape[:2]:
            raise ValueError(
                f"sigma has shape {tuple(sigma.shape)}; it must be (b, t) = {tuple(latents.shape[:2])}."
            )
        level, levels = self.embed_levels(sigma)
        x = self.embed_patches(latents)
        times = range(start, start + latents.shape[1]) if memory is None else memory.times
        if len(times) != latents.shape[1]:
            raise ValueError(f"The pass holds {latents.shape[1]} latents; the memory expects {times}.")
        rope = grid_table(
            times, rows, columns, head_width=self.config.head_width, factor=self.config.rope_factor,
            dtype=torch.promote_types(x.dtype, torch.float32), device=x.device,
        )  # fmt: skip
        prompts = text.layers if isinstance(text, Prompt) else [self.embed_text(text)] * len(self.blocks)
        dtype, states = self.product_dtype, None
        if controls is not None and self.control is not None:
            factors = () if memory is None else memory.factors
            states = self.control(
                controls, starts_clip=times[0] == 0, grid=(rows, columns), factors=factors
            ).to(dtype)
            if states.rays is not None:
                rope = composed(rope, states.rays[1])
        kept: list[FreshKV] = []
        for i, (block, prompt) in enumerate(zip(self.blocks, prompts, strict=True)):
            past = None if memory is None else memory.layer(i)
            x, fresh = block(
                x, levels=levels, rope=rope, text=prompt, control=states, dtype=dtype, memory=past
            )
            kept += [] if fresh is None else [fresh]
        patches = self.head(x, level)
        velocity = rearrange(
            patches, "b t (h w) (p q c) -> b t c (h p) (w q)", h=rows, w=columns, p=PATCH, q=PATCH
        ).to(latents.dtype)
        return velocity if memory is None else (velocity, tuple(kept))

    @property
    def product_dtype(self) -> torch.dtype:
        """What matrix products compute in: autocast's dtype where it is on, else that of the weights. What
        several products read is cast to it once, which autocast would do for each.
        """
        weight = self.patch_embedding.weight
        kind = weight.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return weight.dtype

    def read(self, text: Tensor) -> Prompt:
        """Return a prompt (b, n, text_width) as cross-attention reads it, to be passed as `text`."""
        embedded = self.embed_text(text)
        return Prompt(tuple(block.read(embedded) for block in self.blocks))  # type: ignore[operator]

    def embed_patches(self, latents: Tensor) -> Tensor:
        """Embed patches of (b, t, c, h, w) as tokens (b, t, s, d) of the residual stream.

        The convolution of the public weights has a kernel as large as its stride: a product with one matrix.
        """
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        patches = rearrange(latents, "b t c (h p) (w q) -> b t (h w) (c p q)", p=PATCH, q=PATCH)
        tokens = F.linear(patches.to(weight.dtype), weight.flatten(1), bias)
        half = self.residual in (torch.bfloat16, torch.float16)
        return tokens.to(self.residual if half else torch.promote_types(weight.dtype, self.residual))

    def embed_levels(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Embed noise levels (b, t): for the head (b, t, d), and for the blocks (b, t, 6, d), float32 at
        least.
        """
        dtype = torch.promote_types(next(self.time_embedding.parameters()).dtype, torch.float32)
        sinusoid = self.sinusoid(sigma).to(dtype)
        with torch.autocast(sigma.device.type, enabled=False):
            level = _in_dtype(self.time_embedding, sinusoid)
            levels = _in_dtype(self.time_projection, level)
        return level, rearrange(levels, "b t (m d) -> b t m d", m=6)

    def sinusoid(self, sigma: Tensor) -> Tensor:
        """Return the sinusoid of noise levels (b, t) -> (b, t, freq_width), cosines first, in float64."""
        half = self.config.freq_width // 2
        rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=sigma.device) / half)
        angles = timestep_of(sigma.double())[..., None] * rates
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def embed_text(self, text: Tensor) -> Tensor:
        """Pad prompts (b, n, text_width) with zero rows and embed them, (b, text_length, d)."""
        if text.shape[1] > self.config.text_length or text.shape[2] != self.config.text_width:
            raise ValueError(
                f"text has shape {tuple(text.shape)}; this network takes up to "
                f"{self.config.text_length} rows of width {self.config.text_width}."
            )
        text = F.pad(text, (0, 0, 0, self.config.text_length - text.shape[1]))
        return self.text_embedding(text.to(next(self.text_embedding.parameters()).dtype))


def _in_dtype(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Run linear layers in the dtype of x, whatever dtype their weights are stored in."""
    for layer in layers:
        x = (
            F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
            if isinstance(layer, nn.Linear)
            else layer(x)
        )
    return x
