"""A small causal autoencoder of video: the tiny world's VAE.

Features are kept as (b, t, h, w, c): convolutions see one frame at a time in channels-last memory, and time
is mixed only by showing a block the step before. A clip's first frame is repeated to a group of four, so that
every latent stands for four frames, the first one for frame 0 alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from relic.nn.checkpoints import WeightsSource, load_weights, read_header, save_weights
from relic.nn.cosine_start import start_as_cosine_codec
from relic.types import SPACE_STRIDE, TIME_STRIDE, latents_of

__all__ = ["StreamState", "TinyVAE", "TinyVAEConfig"]

Past = Tensor | None  # (b, 1, h, w, c): what a block saw one step ago; None before the first step


@dataclass(frozen=True, kw_only=True)
class TinyVAEConfig:
    """Sizes of a small autoencoder.

    Each stage has half the resolution of the one before, in time and space; the last has the latents'.

    Args:
        latent_channels: Channels of the latents.
        patch: Pixels a side that the first stage sees as one cell, and twice as many as frames: 2, 4 or 8.
            Large patches are fast and blur.
        widths: Channels of each stage, from pixels to latents: three stages for patch 2, two for 4, one
            for 8.
        encoder_depths: Residual blocks in each stage of the encoder.
        decoder_depths: Residual blocks in each stage of the decoder, in the order of `widths`.
    """

    latent_channels: int = 16
    patch: int = 2
    widths: tuple[int, ...] = (48, 96, 128)
    encoder_depths: tuple[int, ...] = (1, 1, 1)
    decoder_depths: tuple[int, ...] = (1, 1, 2)

    def __post_init__(self) -> None:
        if self.patch not in (2, 4, 8):
            raise ValueError(f"patch={self.patch} must be 2, 4 or 8.")
        stages = {2: 3, 4: 2, 8: 1}[self.patch]
        for name in ("widths", "encoder_depths", "decoder_depths"):
            values = getattr(self, name)
            if len(values) != stages or min(values) < 1:
                raise ValueError(
                    f"{name}={values} must be {stages} positive numbers, one per stage of patch={self.patch}."
                )
        if self.latent_channels < 1:
            raise ValueError(f"latent_channels={self.latent_channels} must be at least 1.")

    @property
    def patch_frames(self) -> int:
        """Frames that the first stage sees as one step."""
        return self.patch // 2

    @property
    def patch_values(self) -> int:
        """Numbers in one cell of the first stage."""
        return 3 * self.patch_frames * self.patch**2

    @classmethod
    def tiny(cls, **changes: Any) -> TinyVAEConfig:
        """0.5 M parameters: fits a small world on two CPU cores in a minute and a half."""
        sizes: dict[str, Any] = {
            "patch": 4,
            "widths": (48, 64),
            "encoder_depths": (1, 1),
            "decoder_depths": (1, 1),
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TinyVAEConfig:
        """Rebuild a config from JSON, which has no tuples."""
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**sizes)


class StreamState(NamedTuple):
    """What a stream carries from chunk to chunk: for each residual block the step before. Never changed."""

    past: tuple[Tensor, ...]


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 2-D convolution to each step of (b, t, h, w, c)."""
    y = conv(x.flatten(0, 1).permute(0, 3, 1, 2))  # a view in channels-last memory
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def fold(x: Tensor, *, frames: int, cells: int) -> Tensor:
    """Move `frames` x `cells` x `cells` neighbours into channels: (b, t, h, w, c) -> (b, t/, h/, w/, c·)."""
    return rearrange(x, "b (t i) (h j) (w k) c -> b t h w (i j k c)", i=frames, j=cells, k=cells)


def unfold(x: Tensor, *, frames: int, cells: int) -> Tensor:
    """Undo `fold`."""
    return rearrange(x, "b t h w (i j k c) -> b (t i) (h j) (w k) c", i=frames, j=cells, k=cells)


class MemoryBlock(nn.Module):
    """A residual block that sees each step beside the one before it; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """x: (b, t, h, w, c) -> the same, and what the next chunk has to be given as `past`."""
        before = torch.zeros_like(x[:, :1]) if past is None else past
        seen = torch.cat([x, torch.cat([before, x[:, :-1]], dim=1)], dim=-1)
        return x + convolve(self.out, F.relu(convolve(self.mix, F.relu(seen)))), x[:, -1:]


class Stage(nn.Module):
    """The residual blocks at one resolution."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MemoryBlock(width) for _ in range(depth))

    def forward(self, x: Tensor, past: Iterator[Past]) -> tuple[Tensor, list[Tensor]]:
        """Take one entry of `past` for each block; return the new ones beside the features."""
        kept = []
        for block in self.blocks:
            x, last = block(x, next(past))
            kept.append(last)
        return x, kept


class Encoder(nn.Module):
    """Video (b, f, h, w, 3), f a multiple of 4 -> moments (b, t, h/8, w/8, 2c)."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.start = nn.Conv2d(config.patch_values, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            Stage(width, depth) for width, depth in zip(widths, config.encoder_depths, strict=True)
        )
        self.down = nn.ModuleList(nn.Linear(8 * fine, coarse) for fine, coarse in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, video: Tensor, past: Sequence[Past]) -> tuple[Tensor, list[Tensor]]:
        config, left, kept = self.config, iter(past), []
        x = convolve(self.start, fold(video, frames=config.patch_frames, cells=config.patch))
        for i, stage in enumerate(self.stages):
            if i:
                x = self.down[i - 1](fold(x, frames=2, cells=2))
            x, last = stage(x, left)
            kept += last
        return convolve(self.head, x), kept


class Decoder(nn.Module):
    """Latents (b, t, h/8, w/8, c), not normalised -> video (b, 4t, h, w, 3)."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths[::-1]
        self.start = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            Stage(width, depth) for width, depth in zip(widths, config.decoder_depths[::-1], strict=True)
        )
        self.up = nn.ModuleList(nn.Linear(coarse, 8 * fine) for coarse, fine in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], config.patch_values, 3, padding=1)

    def forward(self, latents: Tensor, past: Sequence[Past]) -> tuple[Tensor, list[Tensor]]:
        config, left, kept = self.config, iter(past), []
        x = convolve(self.start, latents)
        for i, stage in enumerate(self.stages):
            if i:
                x = unfold(self.up[i - 1](x), frames=2, cells=2)
            x, last = stage(x, left)
            kept += last
        return unfold(convolve(self.head, x), frames=config.patch_frames, cells=config.patch), kept


class TinyVAE(nn.Module):
    """A causal autoencoder with 4x8x8 compression, 1+4+4+... in time.

    Latents outside are normalised; `mean` and `std` of the encoder's output are known here only.

    Args:
        config: Sizes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("mean", torch.zeros(config.latent_channels))
        self.register_buffer("std", torch.ones(config.latent_channels))
        start_as_cosine_codec(config, self.encoder, self.decoder)
        self.to(
            memory_format=torch.channels_last
        )  # as the features are; else every call reorders the weights

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruct video (b, f, 3, h, w)."""
        return self.decode(self.encode(video))

    # -- whole clips -----------------------------------------------------------------------------------------

    def encode(self, video: Tensor) -> Tensor:
        """Encode video (b, f, 3, h, w) in [-1, 1], f = 4k+1 -> normalised latents (b, t, c, h/8, w/8).

        Raises:
            ValueError: If f is not 4k+1, or h or w is not a multiple of 8.
        """
        return self.encode_stream(video, None)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (b, t, c, h/8, w/8) -> video (b, f, 3, h, w) in [-1, 1]."""
        return self.decode_stream(latents, None)[0]

    # -- streams ---------------------------------------------------------------------------------------------

    def encode_stream(self, video: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        """Encode the next frames of a clip: 4k+1 of them with state None, which starts a clip, else 4k.

        video: (b, f, 3, h, w) in [-1, 1] -> latents (b, t, c, h/8, w/8) and the state for the next call.

        Raises:
            ValueError: If the number of frames or their size does not fit.
        """
        moments, state = self._moments(video, state)
        mu, _ = moments.chunk(2, dim=2)
        wide = _at_least_float32(mu)
        return (wide - _per_channel(self.mean, wide)) / _per_channel(self.std, wide), state

    def decode_stream(self, latents: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        """Decode the next latents of a clip; state None starts a clip, whose first latent is one frame.

        latents: (b, t, c, h/8, w/8) -> video (b, f, 3, h, w) in [-1, 1] and the state for the next call.

        Raises:
            ValueError: If the latents have another number of channels.
        """
        if latents.ndim != 5 or latents.shape[2] != self.config.latent_channels or not latents.shape[1]:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; this VAE decodes (b, t, c, h, w) with "
                f"c={self.config.latent_channels} and at least one latent."
            )
        wide = _at_least_float32(latents)
        video, state = self._render(
            wide * _per_channel(self.std, wide) + _per_channel(self.mean, wide), state
        )
        return _at_least_float32(video).clamp(-1.0, 1.0), state

    # -- for training ----------------------------------------------------------------------------------------

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance (b, t, c, h/8, w/8) of the posterior of a clip, not normalised."""
        mu, logvar = _at_least_float32(self._moments(video, None)[0]).chunk(2, dim=2)
        return mu, logvar.clamp(-30.0, 10.0)

    def render(self, latents: Tensor) -> Tensor:
        """Decode latents that are not normalised, and do not clip the video, so that gradients pass."""
        return self._render(latents, None)[0]

    def _moments(self, video: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        if video.ndim != 5 or video.shape[2] != 3 or any(side % SPACE_STRIDE for side in video.shape[3:]):
            raise ValueError(
                f"video has shape {tuple(video.shape)}; it must be (b, f, 3, h, w) with h and w multiples of "
                f"{SPACE_STRIDE}."
            )
        frames = video.shape[1]
        x = rearrange(video, "b f c h w -> b f h w c").to(self._dtype)
        if state is None:
            latents_of(frames)
            x = torch.cat([repeat(x[:, :1], "b 1 h w c -> b n h w c", n=TIME_STRIDE - 1), x], dim=1)
        elif frames == 0 or frames % TIME_STRIDE:
            raise ValueError(
                f"a stream goes on in groups of {TIME_STRIDE} frames, got {frames}; use "
                f"{max(1, frames // TIME_STRIDE) * TIME_STRIDE}."
            )
        x, past = self.encoder(x, self._past(state, sum(self.config.encoder_depths)))
        return rearrange(x, "b t h w c -> b t c h w"), StreamState(tuple(past))

    def _render(self, latents: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        x = rearrange(latents, "b t c h w -> b t h w c").to(self._dtype)
        x, past = self.decoder(x, self._past(state, sum(self.config.decoder_depths)))
        if state is None:
            x = x[:, TIME_STRIDE - 1 :]
        return rearrange(x, "b f h w c -> b f c h w"), StreamState(tuple(past))

    @staticmethod
    def _past(state: StreamState | None, blocks: int) -> Sequence[Past]:
        if state is None:
            return [None] * blocks
        if len(state.past) != blocks:
            raise ValueError(
                f"the state holds {len(state.past)} blocks, this network has {blocks}; another VAE's?"
            )
        return state.past

    # -- dtype -----------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        return self.encoder.start.weight.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> TinyVAE:
        """Keep `mean` and `std` in float32 when the network goes to half precision."""
        exact = self.mean, self.std
        super()._apply(fn, recurse)
        if self.mean.dtype in (torch.float16, torch.bfloat16):
            self.mean, self.std = (value.to(self.mean.device) for value in exact)
        return self

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the weights with a header that rebuilds the network."""
        config = dataclasses.asdict(self.config)
        save_weights(Path(path), self.state_dict(), kind="tiny_vae", config=config)

    @classmethod
    def from_file(cls, path: str | Path) -> TinyVAE:
        """Rebuild a network from its file, in evaluation mode.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it holds something else, or not all of the weights.
        """
        vae = cls(TinyVAEConfig.from_dict(read_header(path, kind="tiny_vae")["config"]))
        load_weights(vae, WeightsSource(path=str(path)), kind="tiny_vae")
        return vae.eval()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)[:, None, None]
