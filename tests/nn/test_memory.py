import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

from relic.nn.context import KV, FreshKV
from relic.nn.memory import Compressed, Full, Memory, MemoryPlan, SinkWindow, Window
from relic.ops.actions import controls_of
from relic.ops.covisibility import redundancy
from relic.ops.masks import memory_mask
from relic.ops.pooling import pool_cells
from relic.ops.retention import SCHEDULE, factors_seen
from relic.parallel import Compute, apply_compute
from tests.nn.streams import (
    COLUMNS,
    CONTROLLED,
    ROWS,
    SMALL,
    clip,
    levels,
    memory_of,
    network,
    normal,
    plan_of,
    stream,
)  # fmt: skip
from tests.reference import memory as reference

SHORT = (1, 3, 2, 3)  # a schedule that fits three rows
POLICIES = [
    Full(),
    Window(latents=4),
    Window(latents=8),
    SinkWindow(sink=1, window=4),
    SinkWindow(sink=3, window=8),
    Compressed(window=4, schedule=SHORT),
    Compressed(window=8, schedule=SHORT),
    Compressed(window=4, schedule=(1, 0, 2, 0, 0)),
    Compressed(window=8, schedule=SHORT, max_latents=13),
]
ids = [str(p) for p in POLICIES]


def masked(net, latents, sigma, text, *, policy, mask, times=None, key_times=None):
    """The oracle over a batch."""
    times = list(range(latents.shape[1])) if times is None else times
    factors = [policy.factor(t) for t in times]
    return torch.stack(
        [
            reference.forward(
                dict(net.named_parameters()), latents[i], sigma[i], text[i], heads=2, depth=2,
                text_length=3, freq_width=32,
                times=times, factors=factors, mask=mask[i] if mask.ndim == 3 else mask,
                key_times=None if key_times is None else key_times[i],
            )
            for i in range(len(latents))
        ]
    )  # fmt: skip


def assert_near(a, b, tolerance=1e-10):
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("policy", POLICIES, ids=ids)
@pytest.mark.parametrize("block_latents", [4, 2])
def test_a_cached_stream_equals_one_masked_pass_over_the_clip(policy, block_latents):
    net, blocks = network(), 12 // block_latents
    latents, sigma, text = clip(13), levels(13), normal(2, 3, 6, seed=9)
    memory = memory_of(policy, block_latents=block_latents)
    c2w = torch.eye(4).double().repeat(2, 13, 1, 1)
    mask = memory_mask(policy, blocks=blocks, block_latents=block_latents, rows=ROWS, columns=COLUMNS)
    streamed = stream(net, memory, latents, sigma, text, c2w=c2w)
    assert_near(streamed, masked(net, latents, sigma, text, policy=policy, mask=mask))


@pytest.mark.parametrize("policy", [Compressed(window=4, schedule=SHORT), POLICIES[-1]], ids=str)
def test_a_memory_in_half_precision_serves_a_network_in_single(policy):
    net, latents, sigma, text = network().float(), clip(13).float(), levels(13), normal(2, 3, 6).float()
    c2w = torch.eye(4).double().repeat(2, 13, 1, 1)
    single, half = (
        stream(net, Memory(plan_of(policy, latents=13), batch=2, dtype=dtype), latents, sigma, text, c2w=c2w)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    error = (half - single).abs().max() / single.abs().max()
    assert 0 < error < 0.05  # 8 bits of mantissa


def test_policies_differ_so_the_oracle_can_tell_them_apart():
    net, latents, sigma, text = network(), clip(13), levels(13), normal(2, 3, 6, seed=9)
    distinct = [Full(), Window(latents=4), SinkWindow(sink=1, window=4), Compressed(window=4, schedule=SHORT)]
    last = [stream(net, memory_of(p), latents, sigma, text)[:, -1] for p in distinct]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(last) for b in last[:i])


def test_half_of_the_history_is_pooled_in_these_tests():
    assert factors_seen(Compressed(window=4, schedule=SHORT), 3, block_latents=4) == (
        1, 3, 2, 3, 1, 3, 2, 3, 1, 1, 1, 1, 1,
    )  # fmt: skip


def test_a_changed_block_leaves_earlier_ones_bit_identical_and_changes_itself_and_later_ones():
    net, sigma, text = network(), levels(13), normal(2, 3, 6)
    policy = Compressed(window=4, schedule=SHORT)
    before = clip(13)
    after = before.clone()
    after[:, 5:9] += 1
    a, b = (stream(net, memory_of(policy), x, sigma, text) for x in (before, after))
    assert torch.equal(a[:, :5], b[:, :5])
    assert all((a[:, i] - b[:, i]).abs().max() > 1e-4 for i in range(5, 13))


def test_a_view_does_not_change_what_the_memory_holds():
    net, latents, sigma, text = network(), clip(9), levels(9), normal(2, 3, 6)
    memory = memory_of(Compressed(window=4, schedule=SHORT))
    stream(net, memory, latents[:, :5], sigma, text)
    call = lambda: net(latents[:, 5:], sigma=sigma[:, 5:], text=text, memory=memory.view())  # noqa: E731
    with torch.no_grad():
        first, none = call()
        net(latents[:, 5:] + 9, sigma=sigma[:, 5:], text=text, memory=memory.view())
        again, _ = call()
    with_gradients, _ = call()
    assert none == () and torch.equal(first, again)
    torch.testing.assert_close(with_gradients, first, rtol=0, atol=1e-12)


def test_a_view_is_refused_after_the_next_commit():
    net, latents, sigma, text = network(), clip(9), levels(9), normal(2, 3, 6)
    memory = memory_of(Full())
    view = memory.view()
    stream(net, memory, latents[:, :1], sigma, text)
    with pytest.raises(ValueError, match=r"The memory changed \(1 latents now\) after this view was taken"):
        net(latents[:, :1], sigma=sigma[:, :1], text=text, memory=view)


def test_gradients_reach_the_network_through_a_view_while_the_memory_is_constant():
    net, latents, sigma, text = network().requires_grad_(True), clip(9), levels(9), normal(2, 3, 6)
    memory = memory_of(Compressed(window=4, schedule=SHORT))
    stream(net, memory, latents[:, :5], sigma, text)
    velocity, fresh = net(latents[:, 5:], sigma=sigma[:, 5:], text=text, memory=memory.view(fresh=True))
    memory.commit(fresh)  # a commit before the backward pass must not disturb it
    velocity.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_recomputing_activations_after_a_commit_is_an_error_and_not_a_wrong_gradient():
    net, latents, sigma, text = network().requires_grad_(True), clip(9), levels(9), normal(2, 3, 6)
    apply_compute(net, Compute(keep="inputs"))
    memory = memory_of(Window(latents=4))
    stream(net, memory, latents[:, :5], sigma, text)
    call = {"sigma": sigma[:, 5:], "text": text}
    net(latents[:, 5:], **call, memory=memory.view())[0].sum().backward()
    velocity, fresh = net(latents[:, 5:], **call, memory=memory.view(fresh=True))
    memory.commit(fresh)
    with pytest.raises(ValueError, match="run the backward pass before the next commit"):
        velocity.sum().backward()


@pytest.mark.parametrize("policy", POLICIES, ids=ids)
def test_tokens_and_bytes_predict_exactly(policy):
    net, latents, sigma, text = network(), clip(13), levels(13), normal(2, 3, 6)
    memory = memory_of(policy)
    c2w = torch.eye(4).double().repeat(2, 13, 1, 1)
    for end in (1, 5, 9, 13):
        own = len(memory.plan.block(memory.block)) * ROWS * COLUMNS
        assert memory.length + own == memory.tokens(end)
        stream(net, memory, latents[:, :end], sigma, text, c2w=c2w)
        assert memory_of(policy, latents=max(end, 5)).nbytes == memory.bytes(max(end, 5))
    assert memory.nbytes == memory.bytes(13)


def test_compressed_takes_a_quarter_of_full_at_20_seconds():
    sizes = {"rows": 30, "columns": 52, "layers": 40, "heads": 40, "head_width": 128}
    small, full = (plan_of(p, latents=81, **sizes) for p in (Compressed(), Full()))
    assert small.tokens(81) == 33_072 == small.capacity and full.tokens(81) == 126_360
    assert small.bytes(81) <= 0.27 * full.bytes(81)
    assert full.bytes(81, dtype=torch.bfloat16) == 2 * 40 * 40 * 128 * 2 * 126_360


def test_the_schedule_is_the_papers():
    assert Compressed().schedule == SCHEDULE == (1, 4, 2, 4, 4, 4, 2, 4, 4, 2, 4, 4, 4, 2, 4, 4, 2, 4)


@pytest.mark.parametrize("policy", POLICIES, ids=ids)
def test_forks_are_independent_and_reset_forgets(policy):
    net, sigma, text = network(), levels(13), normal(2, 3, 6)
    c2w = torch.eye(4).double().repeat(2, 13, 1, 1)
    a, b = clip(13), clip(13, seed=2)
    b[:, :5] = a[:, :5]
    memory = memory_of(policy)
    stream(net, memory, a[:, :5], sigma, text, c2w=c2w)
    fork = memory.fork()
    other = stream(net, fork, b, sigma, text, c2w=c2w)
    mine = stream(net, memory, a, sigma, text, c2w=c2w)
    assert torch.equal(mine, stream(net, memory_of(policy), a, sigma, text, c2w=c2w)[:, 5:])
    memory.reset()
    assert memory.latents == 0 and memory.length == 0
    assert torch.equal(other, stream(net, memory, b, sigma, text, c2w=c2w)[:, 5:])


def test_controls_are_part_of_what_is_remembered():
    net, latents, sigma, text = network(CONTROLLED), clip(13), levels(13), normal(2, 3, 6)
    actions = torch.rand(2, 49, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    changed = actions.clone()
    changed[:, 1:17, 9] += 20  # turn in the first block, turn back: later poses are as before
    policy = Compressed(window=4, schedule=SHORT)
    a, b = (
        stream(
            net, memory_of(policy), latents, sigma, text, controls=controls_of(x)._replace(actions=actions)
        )
        for x in (actions, changed)
    )
    assert (a[:, -1] - b[:, -1]).abs().max() > 1e-5


class SecondToken(nn.Module):
    """A pooling operator with a weight: the mean, moved towards the second token of the cells' first."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, kv: KV, *, factor: int, layer: int) -> KV:
        return KV(*(pool_cells(x, factor=factor) + self.mix * x[:, :, :, 1:2, 1:2] for x in kv))


def test_the_pooling_operator_is_replaceable():
    net, latents, sigma, text = network(), clip(13), levels(13), normal(2, 3, 6)
    policy = Compressed(window=4, schedule=SHORT)
    plain, other = (
        stream(net, memory_of(policy, pool=pool), latents, sigma, text) for pool in (None, SecondToken())
    )
    assert torch.equal(plain[:, :5], other[:, :5]) and (plain - other)[:, -1].abs().max() > 1e-5


# -- bounded memory ------------------------------------------------------------------------------------------


def turning(latents: int, *, degrees: float = 11.0, batch: int = 1) -> torch.Tensor:
    """Poses of a camera that turns on the spot, sample i the other way and faster."""
    angle = torch.deg2rad(degrees * torch.arange(latents, dtype=torch.float64))
    angle = torch.stack([angle * (1 - 2.5 * i) for i in range(batch)])
    c2w = torch.eye(4).double().repeat(batch, latents, 1, 1)
    c2w[..., 0, 0], c2w[..., 0, 2] = angle.cos(), angle.sin()
    c2w[..., 2, 0], c2w[..., 2, 2] = -angle.sin(), angle.cos()
    return c2w


def fresh_of(plan: MemoryPlan, block: int, *, batch: int = 1):
    shape = (batch, plan.heads, len(plan.block(block)) * plan.tokens_per_latent, plan.head_width)
    return tuple(
        FreshKV(torch.full(shape, float(block)), torch.full(shape, float(block))) for _ in range(plan.layers)
    )


def test_a_bounded_memory_keeps_its_size_and_the_image_for_1000_latents():
    plan = plan_of(
        Compressed(max_latents=27), latents=None, rows=4, columns=4, layers=1, heads=1, head_width=2
    )
    memory, c2w = Memory(plan), turning(1001)
    nbytes, lengths = memory.nbytes, set()
    while memory.latents < 1001:
        block = plan.block(memory.block)
        memory.commit(fresh_of(plan, memory.block), c2w=c2w[:, block.start : block.stop])
        if memory.latents > 27:
            lengths.add(memory.length)
            assert memory.view().times == (23, 24, 25, 26)
            assert memory.length + 4 * 16 == plan.tokens(memory.latents + 4) == plan.capacity
    assert len(lengths) == 1 and memory.nbytes == nbytes == memory.bytes(1001)
    assert memory.kept()[0] == 0 and len(memory.kept()) == 19 and len(memory._poses) <= 27
    assert [SCHEDULE[i % 18] for i in memory.kept()] == [*SCHEDULE, 1]


def test_the_latent_that_the_others_show_best_makes_room_for_one_of_its_factor():
    policy = Compressed(window=4, schedule=(1, 2), max_latents=21)
    plan = plan_of(policy, latents=None, layers=1, heads=1, head_width=2)
    memory, c2w = Memory(plan), turning(61, degrees=11.0)
    full = ()
    while memory.latents < 61:
        before, block = memory.kept(), plan.block(memory.block)
        memory.commit(fresh_of(plan, memory.block), c2w=c2w[:, block.start : block.stop])
        if len(before) < 17:
            continue
        full, expected = full or before, list(before)
        for latent in block:
            views = [*expected, latent]
            shown = redundancy(c2w[0, views], reach=(1, 3 / 5)).tolist()
            rivals = [
                (round(s, 6), i) for s, i in zip(shown, views, strict=True) if i and i % 2 == latent % 2
            ]
            leaves = max(rivals)[1]
            if leaves != latent:
                expected[expected.index(leaves)] = latent
        assert memory.kept() == tuple(expected)
    assert full == tuple(range(17)) and len(set(memory.kept()) - set(full)) > 4
    turned = sorted(11 * i % 360 for i in memory.kept())
    gaps = [b - a for a, b in pairwise([*turned, turned[0] + 360])]
    assert max(gaps) < 60, "all round, no view is lost"


def test_a_bounded_stream_equals_the_oracle_with_places_mapped_again_at_every_block():
    policy = Compressed(window=8, schedule=SHORT, max_latents=13)
    net, latents, sigma, text = network(), clip(29), levels(29), normal(2, 3, 6)
    memory, c2w = memory_of(policy, latents=None), turning(29, degrees=25.0, batch=2)
    seen, places, out = [[], []], [[], []], []
    tokens = ROWS * COLUMNS
    while memory.latents < 29:
        block = memory.plan.block(memory.block)
        start = max(0, memory.latents - 4)
        for i in range(2):
            kept = memory.kept(i)
            window = range(start, block.stop)
            order = sorted((*kept, *window))
            place = [float(order.index(t)) if t in order else -1.0 for t in range(29)]
            places[i].append((block, place))
            seen[i].append(factors_seen(policy, memory.block, block_latents=4, kept=kept))
        out.append(stream(net, memory, latents[:, : block.stop], sigma, text, c2w=c2w))
    assert memory.kept(0) != memory.kept(1)  # samples choose for themselves
    mask = torch.stack([mask_of(policy, rows, tokens) for rows in seen])
    truth = masked(net, latents, sigma, text, policy=policy, mask=mask, key_times=places)
    assert_near(torch.cat(out, 1), truth)


def mask_of(policy, seen, tokens):
    """A token mask from the factors that each block sees."""
    cells = [
        len(reference.cells_of(ROWS, COLUMNS, policy.factor(t))) if policy.factor(t) > 1 else 0
        for t in range(29)
    ]
    rows = []
    for block, factors in enumerate(seen):
        factors = (*factors, *[0] * (29 - len(factors)))
        full = [f == 1 for f in factors for _ in range(tokens)]
        pooled = [f > 1 for f, n in zip(factors, cells, strict=True) for _ in range(n)]
        rows += [full + pooled] * (tokens * (1 if block == 0 else 4))
    return torch.tensor(rows)


def test_before_anything_is_given_up_a_bounded_stream_equals_an_unbounded_one():
    net, latents, sigma, text = network(), clip(13), levels(13), normal(2, 3, 6)
    c2w = turning(13, batch=2)
    bounded, free = (
        stream(net, memory_of(Compressed(schedule=SHORT, max_latents=m)), latents, sigma, text, c2w=c2w)
        for m in (13, None)
    )
    assert_near(bounded, free)


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        (Compressed(window=6), {}, "window of 6 latents must be a multiple of block_latents=4; use 4 or 8"),
        (Window(latents=2), {}, "window of 2 latents must be a multiple of block_latents=4; use 4"),
        (Compressed(), {}, "factor 4 needs a grid of at least 4x4 tokens, this one has 3x5"),
        (Full(), {"latents": 3}, "num_latents=3 holds no block of 4 after the image; use at least 5"),
        (Full(), {"latents": 12}, "12 latents must be the image and whole blocks of 4; use 9 or 13"),
        (Full(), {"latents": None}, "needs a horizon; set num_latents"),
        (Full(), {"block_latents": 0}, "block_latents=0 must be at least 1"),
    ],
)
def test_plans_that_cannot_work_are_refused(policy, changes, message):
    with pytest.raises(ValueError, match=message):
        plan_of(policy, **{"latents": 13, **changes})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Compressed(max_latents=26), "max_latents=26 must leave.*use at least 27"),
        (lambda: Compressed(schedule=(1, -1)), r"schedule=\(1, -1\) must hold factors .* at least 1"),
        (lambda: Compressed(schedule=(0, 1)), "the first of them at least 1"),
        (lambda: Compressed(schedule=(1, 0), max_latents=20), r"schedule=\(1, 0\) can't give latents up"),
        (lambda: Window(latents=0), "latents=0 must be at least one block"),
        (lambda: SinkWindow(sink=0, window=4), "sink=0 must be at least 1"),
    ],
)
def test_policies_that_cannot_work_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_commit_that_does_not_fit_is_refused_and_changes_nothing():
    plan = plan_of(Full(), latents=5)
    memory = Memory(plan)
    with pytest.raises(
        ValueError, match=r"Block 0 must bring keys and values of 2 layers of \(1, 2, 15, 12\)"
    ):
        memory.commit(fresh_of(plan, 1))
    for block in (0, 1):
        memory.commit(fresh_of(plan, block))
    with pytest.raises(ValueError, match="num_latents=5, which are committed; plan a longer horizon"):
        memory.commit(fresh_of(plan, 2))
    assert memory.latents == 5


def test_a_memory_that_chooses_by_pose_asks_for_poses():
    plan = plan_of(Compressed(schedule=SHORT, max_latents=13), latents=None)
    with pytest.raises(ValueError, match=r"c2w=None must be the poses \(1, 1, 4, 4\)"):
        Memory(plan).commit(fresh_of(plan, 0))


def test_a_pass_over_another_number_of_latents_is_refused():
    net, memory = network(), memory_of(Full())
    with pytest.raises(ValueError, match="The pass holds 4 latents"):
        net(clip(4), sigma=levels(4), text=normal(2, 3, 6), memory=memory.view())


def test_a_prompt_read_once_gives_the_same_as_reading_it_every_time():
    net, latents, sigma, text = network(), clip(3), levels(3), normal(2, 3, 6)
    assert torch.equal(net(latents, sigma=sigma, text=text), net(latents, sigma=sigma, text=net.read(text)))


def test_yarn_reaches_the_keys_that_are_stored():
    config = dataclasses.replace(SMALL, rope_factor=3.0)
    net, latents, sigma, text = network(config), clip(9), levels(9), normal(2, 3, 6)
    right, wrong = (stream(net, memory_of(Full(), rope_factor=f), latents, sigma, text) for f in (3.0, 1.0))
    torch.testing.assert_close(right[:, :1], net(latents[:, :1], sigma=sigma[:, :1], text=text))
    assert torch.equal(right[:, :1], wrong[:, :1]) and (right - wrong)[:, 5:].abs().max() > 1e-5
