from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from relic.nn import attention
from relic.nn.attention import _ends, attend, attend_segments, preference
from relic.parallel.apply import checkpointed


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


RANGES = (((0, 3), (5, 9)), ((2, 4),), ((0, 9), (4, 6)))
QUERIES = (2, 1, 3)


def segments(dtype=torch.float64, *, device="cpu", width=8) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = (sum(QUERIES), 9, 9)
    return [torch.randn(n, 4, width, generator=draw, dtype=dtype).to(device).requires_grad_() for n in sizes]


def test_every_segment_reads_its_own_ranges_of_the_keys():
    (q, k, v), (again, keys, values) = segments(), segments()
    read = attend_segments(q, k, v, queries=QUERIES, keys=RANGES)
    with torch.no_grad():
        torch.testing.assert_close(attend_segments(q, k, v, queries=QUERIES, keys=RANGES), read)
    expected = []
    for own, seen in zip(again.split(list(QUERIES)), RANGES, strict=True):
        chosen = torch.cat([torch.arange(*pair) for pair in seen])
        scores = torch.einsum("qzd,kzd->zqk", own, keys[chosen]) / 8**0.5
        expected.append(torch.einsum("zqk,kzd->qzd", scores.softmax(-1), values[chosen]))
    torch.testing.assert_close(read, torch.cat(expected))
    for result in (read, torch.cat(expected)):
        (result * torch.arange(4).add(1)[:, None]).square().sum().backward()
    for ours, truth in zip((q, k, v), (again, keys, values), strict=True):
        torch.testing.assert_close(ours.grad, truth.grad)


def test_ends_that_a_sample_asked_for_first_serve_a_fit():
    with torch.inference_mode():
        ends = _ends((3, 1, 4), torch.device("cpu"))
    assert ends.tolist() == [0, 3, 4, 8] and not ends.is_inference()


class CountSegments(TorchDispatchMode):
    """Counts how often all segments attend."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.torch_attn._varlen_attn.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep", "calls"), [("inputs", 2), ("attention", 1), ("products", 1)])
def test_checkpointing_that_keeps_attention_keeps_that_of_segments(keep, calls, monkeypatch):
    """On the meta device, as on a GPU."""
    monkeypatch.setattr(attention, "_takes_segments", lambda q: True)
    inputs = [x.detach().to("meta", torch.bfloat16).requires_grad_() for x in segments(width=64)]
    run = checkpointed(partial(attend_segments, queries=QUERIES, keys=RANGES), keep=keep)
    with CountSegments() as counter:
        run(*inputs).sum().backward()
    assert counter.calls == calls


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 12])
def test_segments_in_half_precision_on_a_gpu_are_those_in_full(width):
    queries = tuple(128 * n for n in QUERIES)
    keys = tuple(tuple((100 * start, 100 * stop) for start, stop in seen) for seen in RANGES)
    draw = torch.Generator("cuda").manual_seed(0)
    whole = [torch.randn(n, 4, width, device="cuda", generator=draw) for n in (sum(queries), 900, 900)]
    weight, results = torch.randn(sum(queries), 4, width, device="cuda", generator=draw), []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.bfloat16().to(dtype).requires_grad_() for x in whole]
        read = attend_segments(*inputs, queries=queries, keys=keys)
        results.append([read, *torch.autograd.grad((read.float() * weight).sum(), inputs)])
    for full, half in zip(*results, strict=True):
        assert (full - half.float()).norm() / full.norm() < 2e-2
