"""From windows to a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from relic.types import Batch, Mixed

__all__ = ["Content", "Sample", "collate", "keys_from"]

Content = Literal["latents", "trajectory", "video"]


class Sample(NamedTuple):
    """One window, read.

    content: latents (t, c, h, w), trajectory (s, t, c, h, w) or video (f, h, w, 3) uint8.
    actions: (f, 13) float32. text: (n,) int64 word ids or (n, d) float32 embeddings.
    d_bar: scene units at the window's rate.
    """

    content: Tensor
    actions: Tensor
    text: Tensor
    d_bar: float
    key: int


def collate(samples: Sequence[Sample], *, content: Content, stacked: Tensor | None = None) -> Batch:
    """Stack windows of one length; `stacked` already holds their contents."""
    if stacked is None:
        stacked = torch.stack([sample.content for sample in samples])
    video = rearrange(stacked, "b f h w c -> b f c h w") if content == "video" else None  # a view: no copy
    return Batch(
        latents=stacked if content == "latents" else None,
        trajectory=stacked if content == "trajectory" else None,
        video=video,
        actions=torch.stack([sample.actions for sample in samples]),
        text=_padded([sample.text for sample in samples]),
        d_bar=torch.tensor([sample.d_bar for sample in samples], dtype=torch.float64),
        key=torch.tensor([sample.key for sample in samples], dtype=torch.int64),
    )


def _padded(prompts: Sequence[Tensor]) -> Tensor:
    """Stack word ids (n,) or embeddings (n, d); shorter prompts get zero rows, as networks pad them."""
    if len({prompt.dtype for prompt in prompts}) > 1:
        raise ValueError("some samples of a batch hold prompt embeddings, others don't; embed them all.")
    return torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)


def keys_from(batch: Any, moved: Any) -> Any:
    """Return a batch moved to a device, its keys left where they were: noise is seeded from them on the host,
    which would have to wait for the device.
    """
    if isinstance(batch, Batch):
        return moved._replace(key=batch.key)
    if isinstance(batch, Mixed):
        return Mixed(*(keys_from(a, b) for a, b in zip(batch, moved, strict=True)))
    return moved
