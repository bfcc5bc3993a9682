"""A slow, plain Wan2.1 DiT in float64 functions over a state dict. Imports nothing from relic: an oracle."""

from __future__ import annotations

import math

import torch


def linear(sd, name, x):
    return x @ sd[f"{name}.weight"].T + sd[f"{name}.bias"]


def layer_norm(x, eps, weight=None, bias=None):
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    return x if weight is None else x * weight + bias


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x, grid, heads):
    """x: (n, width) after QK-norm; complex rotation, pair by pair, head by head."""
    frames, rows, columns = grid
    width = x.shape[-1] // heads
    side = 2 * (width // 6)
    out = x.clone().reshape(len(x), heads, width)
    index = 0
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                start = 0
                for position, size in ((f, width - 2 * side), (r, side), (c, side)):
                    for j in range(size // 2):
                        angle = position * 10000.0 ** (-2 * j / size)
                        pair = torch.complex(out[index, :, start + 2 * j], out[index, :, start + 2 * j + 1])
                        turned = pair * complex(math.cos(angle), math.sin(angle))
                        out[index, :, start + 2 * j] = turned.real
                        out[index, :, start + 2 * j + 1] = turned.imag
                    start += size
                index += 1
    return out.reshape(len(x), heads * width)


def look(x, poses, grid, heads, *, view, inverse_depths, sense=1):
    """Turn what heads hold, (n, width), by where tokens look. poses: for each latent a list of c2w (4, 4), in
    d̄; view: half of width and height in focal lengths; head i has inverse depth i, from the start again.
    """
    frames, rows, columns = grid
    width = x.shape[-1] // heads
    side = 2 * (width // 6)
    sizes = (width - 2 * side, side, side)
    speeds = [10000.0 ** (-2 * j / size) for size in sizes for j in range(size // 2)]
    slow = [pair for pair, speed in enumerate(speeds) if speed < 1 / 8]
    count = len(slow) // 3
    out = x.clone().reshape(len(x), heads, width)
    index = 0
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                a, b = view[0] * (2 * c + 1 - columns) / columns, view[1] * (2 * r + 1 - rows) / rows
                ahead = torch.tensor([a, b, 1.0], dtype=torch.float64) / math.sqrt(a * a + b * b + 1)
                for head in range(heads):
                    near = inverse_depths[head % len(inverse_depths)]
                    points = [pose[:3, :3] @ ahead + near * pose[:3, 3] for pose in poses[f]]
                    point = sum(points) / len(points)
                    for i, pair in enumerate(slow[: 3 * count]):
                        number, axis = divmod(i, 3)
                        frequency = 16.0 ** (number / (count - 1)) if count > 1 else 1.0
                        angle = sense * frequency * float(point[axis])
                        at = torch.complex(out[index, head, 2 * pair], out[index, head, 2 * pair + 1])
                        turned = at * complex(math.cos(angle), math.sin(angle))
                        out[index, head, 2 * pair], out[index, head, 2 * pair + 1] = turned.real, turned.imag
                index += 1
    return out.reshape(len(x), heads * width)


def attention(q, k, v, heads):
    split = lambda x: x.reshape(len(x), heads, -1).transpose(0, 1)  # noqa: E731
    q, k, v = split(q), split(k), split(v)
    scores = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
    return (scores @ v).transpose(0, 1).reshape(q.shape[1], -1)


def forward(sd, latents, sigma, text, *, heads, depth, text_length, freq_width=256, eps=1e-6, rays=None):
    """Velocity of one sample. latents: (c, t, h, w); sigma: (t,); text: (n, text_width); all float64. rays:
    arguments of `look`.
    """
    channels, frames, height, width = latents.shape
    rows, columns = height // 2, width // 2
    tokens = []
    kernel = sd["patch_embedding.weight"].reshape(len(sd["patch_embedding.weight"]), -1)
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                patch = latents[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1)
                tokens.append(kernel @ patch + sd["patch_embedding.bias"])
    x = torch.stack(tokens)
    half = freq_width // 2
    rates = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = 1000.0 * sigma[:, None] * rates
    e = linear(sd, "time_embedding.0", torch.cat([angle.cos(), angle.sin()], 1))
    e = linear(sd, "time_embedding.2", torch.nn.functional.silu(e))
    e0 = linear(sd, "time_projection.1", torch.nn.functional.silu(e)).reshape(frames, 6, -1)
    spread = lambda m: m.repeat_interleave(rows * columns, dim=0)  # noqa: E731
    padded = torch.zeros(text_length, text.shape[1], dtype=torch.float64)
    padded[: len(text)] = text
    context = linear(sd, "text_embedding.2", gelu_tanh(linear(sd, "text_embedding.0", padded)))
    for i in range(depth):
        b = f"blocks.{i}"
        m = [spread(sd[f"{b}.modulation"][0, j] + e0[:, j]) for j in range(6)]
        h = layer_norm(x, eps) * (1 + m[1]) + m[0]
        q = rms(linear(sd, f"{b}.self_attn.q", h), sd[f"{b}.self_attn.norm_q.weight"], eps)
        k = rms(linear(sd, f"{b}.self_attn.k", h), sd[f"{b}.self_attn.norm_k.weight"], eps)
        v = linear(sd, f"{b}.self_attn.v", h)
        grid = (frames, rows, columns)
        if rays is not None:
            q, k, v = (look(y, grid=grid, heads=heads, **rays) for y in (q, k, v))
        a = attention(rotate(q, grid, heads), rotate(k, grid, heads), v, heads)
        if rays is not None:
            a = look(a, grid=grid, heads=heads, sense=-1, **rays)
        x = x + m[2] * linear(sd, f"{b}.self_attn.o", a)
        h = layer_norm(x, eps, sd[f"{b}.norm3.weight"], sd[f"{b}.norm3.bias"])
        q = rms(linear(sd, f"{b}.cross_attn.q", h), sd[f"{b}.cross_attn.norm_q.weight"], eps)
        k = rms(linear(sd, f"{b}.cross_attn.k", context), sd[f"{b}.cross_attn.norm_k.weight"], eps)
        v = linear(sd, f"{b}.cross_attn.v", context)
        x = x + linear(sd, f"{b}.cross_attn.o", attention(q, k, v, heads))
        h = layer_norm(x, eps) * (1 + m[4]) + m[3]
        x = x + m[5] * linear(sd, f"{b}.ffn.2", gelu_tanh(linear(sd, f"{b}.ffn.0", h)))
    shift, scale = (spread(sd["head.modulation"][0, j] + e) for j in range(2))
    y = linear(sd, "head.head", layer_norm(x, eps) * (1 + scale) + shift)
    out = torch.zeros_like(latents)
    index = 0
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                cell = y[index].reshape(2, 2, channels)
                out[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = cell.permute(2, 0, 1)
                index += 1
    return out
