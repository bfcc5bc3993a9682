"""A slow causal DiT in one masked pass over a clip: the plain oracle of cached and blockwise attention.

Functions over a state dict, in float64, one sample at a time. Keys are [full | pooled]; who sees whom is a
mask that is handed in. Imports nothing from relic.nn or relic.rollout.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import silu

from tests.reference.dit import gelu_tanh, layer_norm, linear, rms


def cells_of(rows, columns, factor):
    """The tokens of each cell, as lists of (row, column); row by row."""
    return [
        [
            (r, c)
            for r in range(top, min(top + factor, rows))
            for c in range(left, min(left + factor, columns))
        ]
        for top in range(0, rows, factor)
        for left in range(0, columns, factor)
    ]


def rotate(x, positions, heads):
    """x: (n, width); positions: (n, 3), time, row, column, fractional for cells."""
    width = x.shape[-1] // heads
    side = 2 * (width // 6)
    angles = []
    for axis, size in enumerate((width - 2 * side, side, side)):
        for j in range(size // 2):
            angles.append(positions[:, axis] * 10000.0 ** (-2 * j / size))
    turn = torch.polar(torch.ones((), dtype=torch.float64), torch.stack(angles, 1))
    pairs = torch.view_as_complex(x.reshape(len(x), heads, width // 2, 2).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).reshape(len(x), -1)


def masked_attention(q, k, v, mask, heads):
    """q: (n, width); k, v: (m, width); mask: bool (n, m)."""
    q, k, v = (x.reshape(len(x), heads, -1).transpose(0, 1) for x in (q, k, v))
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(0, 1).reshape(q.shape[1], -1)


def token_positions(times, rows, columns):
    return torch.tensor([(t, r, c) for t in times for r in range(rows) for c in range(columns)]).double()


def pooled_positions(times, cells):
    """Mean positions of the cells of each latent. cells: for each latent, None or lists of (row, column)."""
    found = [
        (t, sum(r for r, _ in cell) / len(cell), sum(c for _, c in cell) / len(cell))
        for t, latent in zip(times, cells, strict=True)
        for cell in latent
    ]
    return torch.tensor(found, dtype=torch.float64).reshape(-1, 3)


def pooled(x, cells, rows, columns):
    """Average the tokens (n, width) of each cell of each latent."""
    x = x.reshape(len(cells), rows, columns, -1)
    means = [
        sum(x[i, r, c] for r, c in cell) / len(cell) for i, latent in enumerate(cells) for cell in latent
    ]
    return torch.stack(means) if means else x.new_zeros(0, x.shape[-1])


def forward(sd, latents, sigma, text, *, heads, depth, text_length, times, factors, mask, key_times=None,
            freq_width=256, eps=1e-6):  # fmt: skip
    """Velocity of one sample.

    latents: (t, c, h, w); sigma: (t,); text: (n, text_width); times: (t,) place of each latent; factors: (t,)
    pooling factor of each, 0 or 1 for none; mask: bool (queries, [full | pooled]).
    key_times: for streams that re-map places, a list of (latents of a query block, places (t,) of all latents
    as that block sees them); its queries and keys are rotated so.
    """
    frames, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    tokens = rows * columns
    patches = latents.reshape(frames, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)
    kernel = sd["patch_embedding.weight"].reshape(len(sd["patch_embedding.weight"]), -1)
    x = (patches @ kernel.T + sd["patch_embedding.bias"]).flatten(0, 2)
    half = freq_width // 2
    rates = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = 1000.0 * sigma[:, None] * rates
    e = linear(
        sd, "time_embedding.2", silu(linear(sd, "time_embedding.0", torch.cat([angle.cos(), angle.sin()], 1)))
    )
    e0 = linear(sd, "time_projection.1", silu(e)).reshape(frames, 6, -1)
    spread = lambda m: m.repeat_interleave(tokens, dim=0)  # noqa: E731
    padded = torch.zeros(text_length, text.shape[1], dtype=torch.float64)
    padded[: len(text)] = text
    context = linear(sd, "text_embedding.2", gelu_tanh(linear(sd, "text_embedding.0", padded)))
    cells = [cells_of(rows, columns, f) if f > 1 else [] for f in factors]
    passes = key_times or [(range(frames), times)]
    for i in range(depth):
        b = f"blocks.{i}"
        m = [spread(sd[f"{b}.modulation"][0, j] + e0[:, j]) for j in range(6)]
        h = layer_norm(x, eps) * (1 + m[1]) + m[0]
        q = rms(linear(sd, f"{b}.self_attn.q", h), sd[f"{b}.self_attn.norm_q.weight"], eps)
        k = rms(linear(sd, f"{b}.self_attn.k", h), sd[f"{b}.self_attn.norm_k.weight"], eps)
        v = linear(sd, f"{b}.self_attn.v", h)
        both_k = torch.cat([k, pooled(k, cells, rows, columns)])
        both_v = torch.cat([v, pooled(v, cells, rows, columns)])
        read = []
        for members, places in passes:
            at = slice(members[0] * tokens, (members[-1] + 1) * tokens)
            positions = token_positions(places, rows, columns)
            both = torch.cat([positions, pooled_positions(places, cells)])
            turned_q = rotate(q[at], positions[at], heads)
            read.append(masked_attention(turned_q, rotate(both_k, both, heads), both_v, mask[at], heads))
        x = x + m[2] * linear(sd, f"{b}.self_attn.o", torch.cat(read))
        h = layer_norm(x, eps, sd[f"{b}.norm3.weight"], sd[f"{b}.norm3.bias"])
        q = rms(linear(sd, f"{b}.cross_attn.q", h), sd[f"{b}.cross_attn.norm_q.weight"], eps)
        k = rms(linear(sd, f"{b}.cross_attn.k", context), sd[f"{b}.cross_attn.norm_k.weight"], eps)
        v = linear(sd, f"{b}.cross_attn.v", context)
        everyone = torch.ones(len(q), len(k), dtype=torch.bool)
        x = x + linear(sd, f"{b}.cross_attn.o", masked_attention(q, k, v, everyone, heads))
        h = layer_norm(x, eps) * (1 + m[4]) + m[3]
        x = x + m[5] * linear(sd, f"{b}.ffn.2", gelu_tanh(linear(sd, f"{b}.ffn.0", h)))
    shift, scale = (spread(sd["head.modulation"][0, j] + e) for j in range(2))
    y = linear(sd, "head.head", layer_norm(x, eps) * (1 + scale) + shift)
    return y.reshape(frames, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)
