from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing

from relic.nn.control import ControlConfig
from relic.nn.forcing import forced_velocity, replayed_velocity
from relic.nn.memory import Compressed, Full, SinkWindow, Window
from relic.ops.actions import controls_of
from relic.ops.masks import forcing_mask, pack
from tests.nn.streams import (
    COLUMNS,
    CONTROLLED,
    ROWS,
    clip,
    levels,
    memory_of,
    network,
    normal,
    part,
    plan_of,
    stream,
)  # fmt: skip
from tests.nn.test_memory import SHORT, SecondToken, assert_near, masked

POLICIES = [
    Full(),
    Window(latents=4),
    SinkWindow(sink=1, window=8),
    Compressed(window=4, schedule=SHORT),
    Compressed(window=8, schedule=SHORT),
    Compressed(window=4, schedule=(1, 0, 2, 0, 0)),
]
CLEAN = {"teacher": 9, "diffusion": 1, "hybrid": 5}  # latents, of a clip of 13 in blocks of 4


def inputs(forcing: str, *, block_latents: int = 4) -> dict:
    """A clip of 13 latents: clean and noisy ones as a forcing has them, levels, prompt."""
    latents, sigma = clip(13), levels(13)
    known = 13 - block_latents if forcing == "teacher" else CLEAN[forcing]
    start = 1 if forcing == "teacher" else known
    noisy = clip(13, seed=7)[:, start:]
    return {
        "noisy": noisy, "clean": latents[:, :known], "sigma": sigma[:, start:],
        "text": normal(2, 3, 6, seed=9), "controls": None, "forcing": forcing,
    }  # fmt: skip


def oracle(net, given, *, policy, block_latents=4, clean_sigma=None):
    blocks = 12 // block_latents
    mask = forcing_mask(
        given["forcing"], policy, blocks=blocks, block_latents=block_latents, rows=ROWS, columns=COLUMNS
    )
    packing = pack(given["forcing"], policy, blocks=blocks, block_latents=block_latents)
    known = given["clean"].shape[1]
    clean_sigma = given["sigma"].new_zeros(2, known) if clean_sigma is None else clean_sigma
    sigma = torch.cat([clean_sigma, given["sigma"]], 1)
    latents = torch.cat([given["clean"], given["noisy"]], 1)
    times = list(packing.times)
    return masked(net, latents, sigma, given["text"], policy=policy, mask=mask, times=times)[:, known:]


@pytest.mark.parametrize("forcing", ["teacher", "diffusion", "hybrid"])
@pytest.mark.parametrize("policy", POLICIES, ids=[str(p) for p in POLICIES])
@pytest.mark.parametrize("block_latents", [4, 2])
def test_blockwise_attention_equals_the_mask(forcing, policy, block_latents):
    net, given = network(), inputs(forcing, block_latents=block_latents)
    plan = plan_of(policy, latents=13, block_latents=block_latents)
    assert_near(
        forced_velocity(net, **given, plan=plan),
        oracle(net, given, policy=policy, block_latents=block_latents),
    )


@pytest.mark.parametrize("forcing", ["teacher", "hybrid"])
def test_gradients_through_the_prefix_are_those_of_the_mask_and_not_zero(forcing):
    policy, results = Compressed(window=4, schedule=SHORT), []
    for run in (
        lambda net, given: forced_velocity(net, **given, plan=plan_of(policy, latents=13)),
        lambda net, given: oracle(net, given, policy=policy),
    ):
        net, given = network().requires_grad_(True), inputs(forcing)
        given["clean"].requires_grad_(True)
        (run(net, given) * clip(13, seed=3)[:, 13 - given["noisy"].shape[1] :]).sum().backward()
        results.append([given["clean"].grad, *(p.grad for p in net.parameters())])
    # clean latents reach the noisy outputs through their keys and values alone, behind the window too
    assert results[0][0].abs().amax((0, 2, 3, 4)).min() > 1e-5
    for ours, truth in zip(*results, strict=True):
        assert (ours - truth).abs().max() <= 1e-9 * truth.abs().max()


def test_a_learned_pooling_operator_is_trained_through_the_prefix():
    pool, given = SecondToken(), inputs("hybrid")
    plan = plan_of(Compressed(window=4, schedule=SHORT), latents=13)
    forced_velocity(network(), **given, plan=plan, pool=pool).square().sum().backward()
    assert pool.mix.grad.abs() > 1e-5


@pytest.mark.parametrize("rays", [0.0, 0.8])
@pytest.mark.parametrize("policy", POLICIES, ids=[str(p) for p in POLICIES])
def test_a_noisy_block_after_a_clean_prefix_is_what_a_stream_would_compute(policy, rays):
    net = network(replace(CONTROLLED, control=ControlConfig(width=8, rays=rays, inverse_depths=(0.1, 0.0))))
    text, actions = normal(2, 3, 6), torch.rand(2, 49, 13).double()
    controls, sigma = controls_of(actions), levels(13)
    clean, noisy = clip(9), clip(4, seed=7)
    forced = forced_velocity(
        net, noisy, clean=clean, sigma=sigma[:, 9:], text=text, controls=controls, forcing="hybrid",
        plan=plan_of(policy, latents=13),
    )  # fmt: skip
    memory = memory_of(policy)
    stream(net, memory, clean, torch.zeros(2, 9).double(), text, controls=controls)
    streamed, _ = net(
        noisy, sigma=sigma[:, 9:], text=text, controls=part(controls, range(9, 13)), memory=memory.view()
    )
    assert_near(forced, streamed)


@pytest.mark.parametrize("rays", [0.0, 0.8])
@pytest.mark.parametrize("policy", POLICIES, ids=[str(p) for p in POLICIES])
@pytest.mark.parametrize("start", [1, 5, 9])
def test_blocks_replayed_at_once_are_what_a_stream_computes_with_its_memory(policy, rays, start):
    net = network(replace(CONTROLLED, control=ControlConfig(width=8, rays=rays, inverse_depths=(0.1, 0.0))))
    net.requires_grad_(True)
    text, controls = normal(2, 3, 6), controls_of(torch.rand(2, 49, 13).double())
    clean, noisy, sigma = clip(13).requires_grad_(), clip(13, seed=7), levels(13)
    weight, results = clip(13, seed=3), []
    replayed = replayed_velocity(
        net, noisy[:, start:], clean=clean[:, :9], sigma=sigma[:, start:], clean_sigma=torch.zeros(2, 9),
        text=text, controls=controls, plan=plan_of(policy, latents=13),
    )  # fmt: skip
    memory, streamed = memory_of(policy), []
    for block in map(memory.plan.block, range(1 + 12 // 4)):
        at = slice(block.start, block.stop)
        given = {"text": text, "controls": part(controls, block)}
        if block.start >= start:
            streamed.append(net(noisy[:, at], sigma=sigma[:, at], memory=memory.view(), **given)[0])
        with torch.no_grad():
            _, fresh = net(clean[:, at], sigma=0 * sigma[:, at], memory=memory.view(fresh=True), **given)
        memory.commit(fresh)
    for velocity in (replayed, torch.cat(streamed, dim=1)):
        inputs = (clean, *net.parameters())
        grads = torch.autograd.grad((velocity * weight[:, start:]).sum(), inputs, allow_unused=True)
        assert grads[0] is None  # the past is a constant
        results.append((velocity, grads[1:]))
    (ours, mine), (truth, theirs) = results
    assert_near(ours, truth)
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_blocks_that_do_not_follow_what_is_clean_are_refused():
    net, controls = network(CONTROLLED), controls_of(torch.rand(2, 49, 13).double())
    shared = {"text": normal(2, 3, 6), "controls": controls, "plan": plan_of(Full(), latents=13)}
    for clean, noisy, message in ((8, 4, "8 latents must be"), (9, 6, "7 latents must be"), (5, 12, "-3")):
        with pytest.raises(ValueError, match=message):
            replayed_velocity(
                net, clip(noisy), clean=clip(clean), sigma=levels(noisy), clean_sigma=levels(clean), **shared
            )


def test_every_block_of_teacher_forcing_is_hybrid_forcing_of_that_block_alone():
    net, text, actions = network(CONTROLLED), normal(2, 3, 6), torch.rand(2, 49, 13).double()
    controls, sigma, plan = (
        controls_of(actions),
        levels(13)[:, 1:],
        plan_of(Compressed(window=4, schedule=SHORT), latents=13),
    )
    clean, noisy = clip(13), clip(12, seed=7)
    shared = {"text": text, "plan": plan}
    packed = forced_velocity(
        net, noisy, clean=clean[:, :9], sigma=sigma, controls=controls, forcing="teacher", **shared
    )
    for start in (1, 5, 9):
        at = slice(start - 1, start + 3)
        alone = forced_velocity(
            net, noisy[:, at], clean=clean[:, :start], sigma=sigma[:, at], forcing="hybrid",
            controls=part(controls, range(1))._replace(
                actions=actions[:, : 4 * start + 13], poses=controls.poses[:, : 4 * start + 13]
            ), **shared,
        )  # fmt: skip
        assert_near(packed[:, at], alone)


def test_context_may_be_given_at_a_noise_level():
    net, given, policy = network(), inputs("hybrid"), Full()
    clean_sigma = torch.full((2, 5), 0.625, dtype=torch.float64)
    clean_sigma[:, 0] = 0
    plan = plan_of(policy, latents=13)
    noised = forced_velocity(net, **given, clean_sigma=clean_sigma, plan=plan)
    assert_near(noised, oracle(net, given, policy=policy, clean_sigma=clean_sigma))
    assert (noised - forced_velocity(net, **given, plan=plan)).abs().max() > 1e-4


@pytest.mark.slow
def test_one_compiled_block_serves_every_layer_and_step_of_a_training_pass():
    net, given = network().requires_grad_(True), inputs("hybrid")
    plan = plan_of(Compressed(window=4, schedule=SHORT), latents=13)
    plain, compiled = forced_velocity(net, **given, plan=plan), torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    for block in net.blocks:
        block.forward = torch.compile(block.forward, backend=compiled)
    for _ in range(2):
        assert_near(forced_velocity(net, **given, plan=plan), plain)
    # the block and its self-attention, each before keys are read and after it, and what turns keys in between
    assert compiled.frame_count == 5


@pytest.mark.slow
def test_what_is_compiled_serves_clips_of_every_length():
    net = network().requires_grad_(True)
    policy, compiled = Compressed(window=4, schedule=SHORT), torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    for block in net.blocks:
        block.forward = torch.compile(block.forward, backend=compiled)
    counts = []
    for latents in (13, 9, 17, 11, 15, 21):
        given = inputs("hybrid") | {
            "clean": clip(5),
            "noisy": clip(latents - 5),
            "sigma": levels(latents)[:, 5:],
        }
        plan = plan_of(policy, latents=latents, block_latents=2)
        forced_velocity(net, **given, plan=plan)
        counts.append(compiled.frame_count)
    assert counts[-1] == counts[2]  # the first length, then any


@pytest.mark.slow
@pytest.mark.parametrize("rays", [0.0, 0.8])
def test_what_is_compiled_serves_every_layer_and_length_of_a_replay(rays):
    control = ControlConfig(width=8, rays=rays, inverse_depths=(0.1, 0.0))
    net = network(replace(CONTROLLED, depth=4, control=control)).requires_grad_(True)
    policy, compiled = Compressed(window=4, schedule=SHORT), torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    for block in net.blocks:
        block.forward = torch.compile(block.forward, backend=compiled)
    counts = []
    for latents, start in ((13, 1), (13, 5), (9, 1), (17, 1), (21, 5), (15, 1)):
        replayed_velocity(
            net, clip(latents, seed=7)[:, start:], clean=clip(latents - 2), sigma=levels(latents)[:, start:],
            clean_sigma=torch.zeros(2, latents - 2), text=normal(2, 3, 6),
            controls=controls_of(torch.rand(2, 4 * latents - 3, 13).double()),
            plan=plan_of(policy, latents=latents, block_latents=2, layers=4),
        )  # fmt: skip
        counts.append(compiled.frame_count)
    assert counts[1] == counts[0] <= 12  # six pieces, without gradients and with them, of all layers
    assert counts[-1] == counts[3]


@pytest.mark.parametrize(
    ("forcing", "clean", "noisy", "message"),
    [
        ("diffusion", 5, 8, "can't take 5 clean ones; give the image and 0 more"),
        ("teacher", 5, 12, "can't take 5 clean ones; give the image and 8 more"),
        ("hybrid", 6, 8, "14 latents must be the image and whole blocks of 4"),
        ("hybrid", 13, 0, "with 0 noisy latents"),
        ("both", 5, 8, "forcing='both' must be one of teacher, diffusion, hybrid"),
    ],
)
def test_latents_that_do_not_fit_a_forcing_are_refused(forcing, clean, noisy, message):
    with pytest.raises(ValueError, match=message):
        forced_velocity(
            network(), clip(13)[:, :noisy], clean=clip(13)[:, :clean], sigma=levels(13)[:, :noisy],
            text=normal(2, 3, 6), controls=None, plan=plan_of(Full(), latents=13), forcing=forcing,
        )  # fmt: skip
