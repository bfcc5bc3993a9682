import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

from relic.nn import attention
from relic.nn.attention import attend, attend_segments, preference
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


def test_queries_of_a_few_keys_are_dealt_out_and_come_back(monkeypatch):
    draw, results, seen = torch.Generator().manual_seed(0), [], []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda q, k, v: seen.append(len(q)) or plain(q, k, v)
    )
    q, k, v = (torch.randn(2, 3, n, 8, generator=draw, dtype=torch.float64) for n in (48, 5, 5))
    weight = torch.randn(2, 3, 48, 8, generator=draw, dtype=torch.float64)
    for fast in (False, True):
        monkeypatch.setattr(attention, "_fast", lambda q, fast=fast: fast)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        read = attend(*inputs, parts=6)
        results.append([read, *torch.autograd.grad((read * weight).sum(), inputs)])
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, parts=6), results[0][0])
    assert seen == [2, 12, 2]  # samples: only a backward pass asks for more
    for whole, dealt in zip(*results, strict=True):
        torch.testing.assert_close(dealt, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(256, 1000), (4096, 4096), (4096, 32)])
def test_every_kernel_gives_the_same(sizes):
    q, k, v = (torch.randn(1, 2, n, 64, device="cuda") for n in (sizes[0], sizes[1], sizes[1]))
    halves, results = [x.bfloat16() for x in (q, k, v)], []
    for inputs in (halves, [x.float() for x in halves]):
        inputs = [x.requires_grad_() for x in inputs]
        read = attend(*inputs, parts=8)
        results.append([read, *torch.autograd.grad(read.square().sum(), inputs)])
    for half, full in zip(*results, strict=True):
        assert (half.float() - full).norm() / full.norm() < 1e-2


RANGES = (((0, 3), (5, 9)), ((2, 4),), ((0, 4), (6, 9)))
QUERIES = (2, 1, 3)


def segments(dtype=torch.float64, *, device="cpu", width=8) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = (sum(QUERIES), 9, 9)
    drawn = [torch.randn(2, 2, n, width, generator=draw, dtype=dtype) for n in sizes]
    return [x.to(device).requires_grad_() for x in drawn]


@pytest.fixture
def uncompiled(monkeypatch):
    """Segments are read as on a GPU, by the kernel as it stands, slow; the value sets its tiles."""
    monkeypatch.setattr(attention, "_takes_segments", lambda q: True)
    monkeypatch.setattr(attention, "_compiled", lambda: flex_attention)
    attention._tiles.cache_clear()
    yield lambda tile: monkeypatch.setattr(attention, "TILE", tile)
    attention._tiles.cache_clear()


def test_every_segment_reads_its_own_ranges_of_the_keys():
    (q, k, v), (again, keys, values) = segments(), segments()
    read = attend_segments(q, k, v, queries=QUERIES, keys=RANGES)
    with torch.no_grad():
        torch.testing.assert_close(attend_segments(q, k, v, queries=QUERIES, keys=RANGES), read)
    expected = []
    for own, seen in zip(again.split(list(QUERIES), dim=2), RANGES, strict=True):
        chosen = torch.cat([torch.arange(*pair) for pair in seen])
        scores = own @ keys[:, :, chosen].mT / 8**0.5
        expected.append(scores.softmax(-1) @ values[:, :, chosen])
    torch.testing.assert_close(read, torch.cat(expected, dim=2))
    for result in (read, torch.cat(expected, dim=2)):
        (result * torch.arange(4).add(1).view(2, 2, 1, 1)).square().sum().backward()
    for ours, truth in zip((q, k, v), (again, keys, values), strict=True):
        torch.testing.assert_close(ours.grad, truth.grad)


def listed(counts: torch.Tensor, numbers: torch.Tensor) -> list[list[int]]:
    return [sorted(row[:n].tolist()) for n, row in zip(counts[0, 0].tolist(), numbers[0, 0], strict=True)]


@pytest.mark.parametrize("tile", [2, 3, 4])  # whole tiles of queries but for 4, of keys for 3 alone
def test_the_kernel_that_takes_segments_is_told_who_sees_whom(tile, uncompiled):
    uncompiled(tile)
    q, k, v = (x.detach() for x in segments())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_takes_segments", lambda q: False)
        expected = attend_segments(q, k, v, queries=QUERIES, keys=RANGES)
    torch.testing.assert_close(attend_segments(q, k, v, queries=QUERIES, keys=RANGES), expected)


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 16])
def test_tiles_are_whole_where_all_see_all_and_left_out_where_no_one_sees_anyone(tile, uncompiled):
    uncompiled(tile)
    mask = attention._tiles(QUERIES, RANGES, 9, torch.device("cpu"))
    sees = torch.zeros(-(-sum(QUERIES) // tile) * tile, -(-9 // tile) * tile, dtype=torch.bool)
    start = 0
    for count, seen in zip(QUERIES, RANGES, strict=True):
        for pair in seen:
            sees[start : start + count, slice(*pair)] = True
        start += count
    squares = sees.unflatten(0, (-1, tile)).unflatten(2, (-1, tile)).movedim(1, 2).flatten(2)
    whole = [row.nonzero()[:, 0].tolist() for row in squares.all(-1)]
    some = [row.nonzero()[:, 0].tolist() for row in squares.any(-1) & ~squares.all(-1)]
    assert listed(mask.full_kv_num_blocks, mask.full_kv_indices) == whole
    assert listed(mask.kv_num_blocks, mask.kv_indices) == some
    of_query, of_key = torch.arange(6)[:, None], torch.arange(9)
    assert mask.mask_mod(None, None, of_query, of_key).equal(sees[:6, :9])


def test_tiles_that_a_sample_asked_for_first_serve_a_fit():
    with torch.inference_mode():
        mask = attention._tiles((3, 1), (((0, 4),), ((2, 4),)), 4, torch.device("cpu"))
    assert not mask.kv_indices.is_inference() and not mask.q_indices.is_inference()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 12])
@pytest.mark.parametrize("tokens", [128, 100])  # 100: borders of segments lie within tiles
def test_segments_in_half_precision_on_a_gpu_are_those_in_full(width, tokens):
    queries = tuple(tokens * n for n in QUERIES)
    keys = tuple(tuple((100 * start, 100 * stop) for start, stop in seen) for seen in RANGES)
    draw = torch.Generator("cuda").manual_seed(0)
    sizes = (sum(queries), 900, 900)
    whole = [torch.randn(2, 2, n, width, device="cuda", generator=draw) for n in sizes]
    weight, results = torch.randn(2, 2, sizes[0], width, device="cuda", generator=draw), []
    runs = (
        (torch.float32, attend_segments),
        (torch.bfloat16, attend_segments),
        (torch.bfloat16, checkpointed(attend_segments, keep="attention")),
    )
    for dtype, run in runs:
        inputs = [x.bfloat16().to(dtype).requires_grad_() for x in whole]
        read = run(*inputs, queries=queries, keys=keys)
        results.append([read, *torch.autograd.grad((read.float() * weight).sum(), inputs)])
    for full, *halves in zip(*results, strict=True):
        for half in halves:
            assert (full - half.float()).norm() / full.norm() < 2e-2
