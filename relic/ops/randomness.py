"""Randomness as a pure function of what it is for: no generator is shared, advanced or saved."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from relic.types import Clip

__all__ = ["clip_key", "derive_seed", "keyed_generator", "keyed_normal", "keyed_uniform"]


def derive_seed(*key: int | str) -> int:
    """Hash a key, e.g. (seed, stage, batch index, sample index, purpose), to 63 bits, alike everywhere."""
    plain = (str(part) if isinstance(part, str) else operator.index(part) for part in key)  # np.int64(3) is 3
    digest = hashlib.blake2b("\x1f".join(map(repr, plain)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator seeded by `derive_seed(*key)`."""
    return torch.Generator(device).manual_seed(derive_seed(*key))


def clip_key(clip: Clip, *, seed: int) -> int:
    """Return a key for generating a clip again: a function of its first frame and `seed`, so that neither its
    neighbours nor its place among them matter, and other actions from one image meet the same noise.
    """
    return derive_seed("clip", seed, hashlib.sha256(clip.video[0].cpu().numpy().tobytes()).hexdigest())


def keyed_normal(keys: Tensor | Sequence[int], *purpose: int | str, like: Tensor) -> Tensor:
    """Draw standard normal noise in the shape of `like` (b, ...), each sample from its own key, (b,)."""
    return torch.stack(
        [
            torch.randn(
                row.shape, generator=keyed_generator(int(k), *purpose, device=like.device), device=like.device
            )
            for k, row in zip(_listed(keys), like, strict=True)
        ]
    ).to(like.dtype)


def keyed_uniform(keys: Tensor | Sequence[int], *purpose: int | str, size: tuple[int, ...] = ()) -> Tensor:
    """Draw uniform numbers in [0, 1) on the CPU, float64: one per key, (b, *size)."""
    return torch.stack(
        [
            torch.rand(size, generator=keyed_generator(int(k), *purpose), dtype=torch.float64)
            for k in _listed(keys)
        ]
    )


def _listed(keys: Tensor | Sequence[int]) -> list[int]:
    return keys.tolist() if isinstance(keys, Tensor) else list(keys)
