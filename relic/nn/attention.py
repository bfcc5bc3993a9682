"""One façade for attention kernels: every caller states queries, keys and values, none names a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["attend", "preference"]

# cuDNN is 1.7x faster than the flash kernel at Wan's shapes on Hopper, but has to plan each new shape, which
# takes long: a student's blocks all have other lengths, and small ones are soon done either way.
WORTH_A_PLAN = 2**22  # scores of a head, queries times keys
REST = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LARGE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *REST]
SMALL = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *REST]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v. q: (b, k, n, d); k, v: (b, k, m, d) -> (b, k, n, d). Nothing is masked."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        with sdpa_kernel(preference(q.shape[2], k.shape[2]), set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def preference(queries: int, keys: int) -> list[SDPBackend]:
    """Return kernels for so many queries and keys, the best first; the order is no demand."""
    return LARGE if queries * keys >= WORTH_A_PLAN else SMALL
