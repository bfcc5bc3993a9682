"""How the small autoencoder starts: as a cosine codec, to which training adds detail; that saves minutes."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["start_as_cosine_codec"]


@torch.no_grad()
def start_as_cosine_codec(config: Any, encoder: Any, decoder: Any) -> None:
    """Set an encoder to a cosine transform that keeps low frequencies, a decoder to its inverse, plus noise.

    config, encoder, decoder: the parts of a `TinyVAE`. Its residual blocks start as the identity, so that
    without the noise the whole is linear and already shows a blurred video.
    """
    frames, cells = config.patch_frames, config.patch
    rows = _low_frequencies(frames, cells, basis=_luma_chroma(), keep=config.widths[0])
    scale = math.sqrt(frames * cells**2)  # features stay as large as pixels
    _put(encoder.start, rows / scale)
    _put(decoder.head, rows.mT * scale)
    for i, (fine, coarse) in enumerate(pairwise(config.widths), 1):
        rows = _low_frequencies(2, 2, basis=torch.eye(fine, dtype=torch.float64), keep=coarse)
        _put(encoder.down[i - 1], rows / math.sqrt(8))
        _put(decoder.up[-i], rows.mT * math.sqrt(8))
    first = torch.eye(config.latent_channels, config.widths[-1])
    _put(encoder.head, first)
    _put(decoder.start, first.mT)
    nn.init.zeros_(encoder.head.weight[config.latent_channels :])
    nn.init.constant_(encoder.head.bias[config.latent_channels :], -8.0)  # narrow beside every channel


def _put(layer: Any, matrix: Tensor, *, noise: float = 0.3) -> None:
    """Set a layer to `matrix` (at the middle of a convolution) plus its own initial weights times `noise`."""
    layer.weight.mul_(noise)
    layer.bias.zero_()
    centre = layer.weight[..., 1, 1] if layer.weight.ndim == 4 else layer.weight
    rows, columns = matrix.shape
    centre[:rows, :columns] += matrix.to(centre.dtype)


def _low_frequencies(frames: int, cells: int, *, basis: Tensor, keep: int) -> Tensor:
    """Return the `keep` lowest rows of an orthonormal cosine basis of folded features, zero rows after them.

    basis: (c, c) orthonormal, the most important row first -> (keep, frames · cells · cells · c), as folded.
    """
    rows = torch.kron(torch.kron(_cosines(frames), _cosines(cells)), torch.kron(_cosines(cells), basis))
    order = product(range(frames), range(cells), range(cells), range(len(basis)))
    # variance of natural video falls about so
    cost = [(1 + i) * (1 + j) * (1 + k) * (1 + n) for i, j, k, n in order]
    lowest = sorted(range(len(cost)), key=cost.__getitem__)[:keep]
    return F.pad(rows[lowest], (0, 0, 0, keep - len(lowest)))


def _cosines(size: int) -> Tensor:
    place = torch.arange(size, dtype=torch.float64)
    return F.normalize(torch.cos(math.pi / size * place[:, None] * (place + 0.5)), dim=1)


def _luma_chroma() -> Tensor:
    return F.normalize(torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64), dim=1)
