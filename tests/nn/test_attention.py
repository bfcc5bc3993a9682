import pytest
import torch
from torch.nn.attention import SDPBackend

from relic.nn.attention import attend, preference


def test_kernels_that_plan_are_for_what_is_worth_a_plan():
    block_of_wan, block_of_a_small_world = preference(6240, 12480), preference(256, 2700)
    assert block_of_wan[0] == preference(2688, 2688)[0] == SDPBackend.CUDNN_ATTENTION
    assert block_of_a_small_world[0] == SDPBackend.FLASH_ATTENTION
    assert set(block_of_wan) == set(block_of_a_small_world)


def test_attention_is_the_softmax_of_scaled_products():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=draw, dtype=torch.float64) for n in (5, 7, 7))
    expected = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(256, 1000), (4096, 4096)])
def test_every_kernel_gives_the_same(sizes):
    q, k, v = (torch.randn(1, 2, n, 64, device="cuda") for n in (sizes[0], sizes[1], sizes[1]))
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
    assert (half - attend(q, k, v)).norm() / half.norm() < 1e-2
