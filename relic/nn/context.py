"""What the tokens of a pass attend to, when it is not each other: the one thing that makes a DiT causal.

A network hands each layer's queries, keys and values to the context it was given and adds up what comes back.
It doesn't know whether behind it there is a memory (`relic.nn.memory`) or a training pass
(`relic.nn.forcing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from relic.ops.rope import turn_heads

__all__ = ["KV", "Context", "Fresh", "FreshKV", "LayerContext", "Pool", "Prompt", "Rays", "Turns"]

# tables (b, z, n, 2, d) by which heads are turned: of the tokens (1), and of their cells of each factor
Rays = Mapping[int, Tensor]


class KV(NamedTuple):
    """Keys and values of one layer, (b, k, n, d) each."""

    k: Tensor
    v: Tensor


class Turns(NamedTuple):
    """The tables by which keys and values are turned, None where they are not: keys by places and rays,
    values by rays alone. (n, 2, d), or (b, z, n, 2, d) with rays.
    """

    keys: Tensor | None
    values: Tensor | None

    @classmethod
    def of_tokens(cls, rope: Tensor, rays: Rays | None) -> Turns:
        """Return those of the tokens of a pass, as a `LayerContext` is given them."""
        return cls(rope, None if rays is None else rays[1])

    def __call__(self, kv: KV) -> KV:
        """Return keys and values, turned."""
        return KV(*(x if table is None else turn_heads(x, table) for x, table in zip(kv, self, strict=True)))


class FreshKV(NamedTuple):
    """Keys and values of one layer as a pass computed them, (b, k, n, d) each, after QK-norm and not turned;
    and the rays that turn them, None in a network without.
    """

    k: Tensor
    v: Tensor
    rays: Rays | None = None


Fresh = tuple[FreshKV, ...]  # of every layer: what a pass computed of its own latents


class LayerContext(Protocol):
    """One layer's attention."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, rope: Tensor, rays: Rays | None = None
    ) -> tuple[Tensor, FreshKV | None]:
        """Return what the queries read, (b, k, n, d), and the fresh keys and values if they are asked for.

        q, k, v: (b, k, n, d), q and k after QK-norm, none of them turned. rope: by which q and k are turned,
        (n, 2, d) of the tokens' places, or (b, z, n, 2, d) of places and rays. rays: by which v is turned, as
        what is read still is.
        """


class Context(Protocol):
    """All layers' attention in one pass."""

    @property
    def times(self) -> tuple[int, ...]:
        """The place in time of each latent of the pass; the clip starts at 0."""

    @property
    def factors(self) -> tuple[int, ...]:
        """The factors by which it pools, of whose cells it needs the rays."""

    def layer(self, index: int) -> LayerContext:
        """Return the attention of a layer."""


class Pool(Protocol):
    """Pool keys and values over cells of factor x factor tokens; may be an nn.Module with weights."""

    def __call__(self, kv: KV, *, factor: int, layer: int) -> KV:
        """kv: (b, k, t, h, w, d) each, not turned -> (b, k, t, h', w', d), sizes rounded up."""


class Prompt(NamedTuple):
    """A prompt as cross-attention reads it: keys and values of every layer, (b, k, text_length, d)."""

    layers: tuple[KV, ...]
