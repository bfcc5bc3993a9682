"""What the tokens of a pass attend to, when it is not each other: the one thing that makes a DiT causal.

A network hands each layer's queries, keys and values to the context it was given and adds up what comes back.
It doesn't know whether behind it there is a memory (`relic.nn.memory`) or a training pass
(`relic.nn.forcing`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["KV", "Context", "Fresh", "LayerContext", "Pool", "Prompt"]


class KV(NamedTuple):
    """Keys and values of one layer, (b, k, n, d) each. Fresh ones are after QK-norm and rays, before RoPE."""

    k: Tensor
    v: Tensor


Fresh = tuple[KV, ...]  # of every layer: what a pass computed of its own latents


class LayerContext(Protocol):
    """One layer's attention."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, rope: Tensor) -> tuple[Tensor, KV | None]:
        """Return what the queries read, (b, k, n, d), and the fresh keys and values if they are asked for.

        q, k, v: (b, k, n, d), q and k after QK-norm and before RoPE; rope: (n, 2, d) of these tokens.
        """


class Context(Protocol):
    """All layers' attention in one pass."""

    @property
    def times(self) -> tuple[int, ...]:
        """The place in time of each latent of the pass; the clip starts at 0."""

    def layer(self, index: int) -> LayerContext:
        """Return the attention of a layer."""


class Pool(Protocol):
    """Pool keys and values over cells of factor x factor tokens; may be an nn.Module with weights."""

    def __call__(self, kv: KV, *, factor: int, layer: int) -> KV:
        """kv: (b, k, t, h, w, d) each, keys before RoPE -> (b, k, t, h', w', d), sizes rounded up."""


class Prompt(NamedTuple):
    """A prompt as cross-attention reads it: keys and values of every layer, (b, k, text_length, d)."""

    layers: tuple[KV, ...]
