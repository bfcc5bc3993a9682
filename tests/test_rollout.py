import dataclasses

import pytest
import torch

from relic.nn.control import ControlConfig
from relic.nn.denoiser import Denoiser
from relic.nn.dit import DiTConfig
from relic.nn.memory import Compressed, Full, Memory, MemoryPlan, SinkWindow, Window
from relic.nn.text import WordTableConfig
from relic.ops.actions import controls_of, integrate
from relic.ops.flow import add_noise, x0_of
from relic.rollout import DrawnNoise, FewSteps, KeyedNoise, Rollout, walk
from relic.types import ClipSpec
from tests.nn.streams import normal, part

CONFIG = DiTConfig(
    width=24, depth=2, heads=2, ffn=32, latent_channels=2, text_width=6, text_length=3, freq_width=32,
    control=ControlConfig(width=8),
)  # fmt: skip
CLIP = ClipSpec(height=48, width=80, horizons=(49,), block_latents=4)  # 13 latents of 3x5 tokens
SHORT = Compressed(window=4, schedule=(1, 3, 2, 3))


def network(*, words: bool = False) -> Denoiser:
    torch.manual_seed(0)
    net = Denoiser(CONFIG, WordTableConfig(width=6) if words else None).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.requires_grad_(False)


def rollout_of(net=None, *, policy=SHORT, batch=2, keys=(11, 12), endless=False, **settings) -> Rollout:
    plan = MemoryPlan.of(CONFIG, CLIP, policy, endless=endless)
    memory = Memory(plan, batch=batch, dtype=torch.float64)
    sampler = FewSteps(**{k: settings.pop(k) for k in ("steps", "context") if k in settings})
    return Rollout(net or network(), memory, noise=KeyedNoise(keys[:batch]), sampler=sampler, **settings)


def actions(frames: int = 49, *, batch: int = 2, seed: int = 3) -> torch.Tensor:
    return torch.rand(batch, frames, 13, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGE, TEXT = normal(2, 1, 2, 6, 10), normal(2, 3, 6, seed=9)


def generate(rollout: Rollout, steer: torch.Tensor, *, image=IMAGE, text=TEXT) -> torch.Tensor:
    """The fold: a clip (b, t, c, h, w) from its image, actions and prompt."""
    rollout.prefill(image, steer[:, :1], text=text)
    blocks = rollout(steer[:, 1:].split(16, dim=1), text=text)
    return torch.cat([image, *(block.latents for block in blocks)], dim=1)


def test_the_default_steps_are_the_published_timesteps():
    timesteps = 1000 * torch.tensor(FewSteps().levels, dtype=torch.float64)
    torch.testing.assert_close(timesteps, torch.tensor([1000, 937.5, 2500 / 3, 625], dtype=torch.float64))
    assert FewSteps().context_level == 0 and FewSteps(context="last_step").context_level == 0.625


@pytest.mark.parametrize("policy", [Full(), Window(latents=4), SinkWindow(sink=1, window=8), SHORT], ids=str)
@pytest.mark.parametrize("context", ["clean", "last_step"])
def test_a_fold_equals_a_stream_that_is_stepped_by_hand(policy, context):
    whole = generate(rollout_of(policy=policy, context=context), actions())
    rollout = rollout_of(policy=policy, context=context)
    rollout.prefill(IMAGE, actions()[:, :1], text=TEXT)
    for index, start in ((1, 1), (2, 17), (3, 33)):
        block = rollout.step(actions()[:, start : start + 16], text=TEXT.clone())
        assert block.index == index
        assert torch.equal(block.latents, whole[:, 4 * index - 3 : 4 * index + 1])


def test_a_rollout_is_its_steps_written_out():
    net, policy, steer = network(), Full(), actions(33)
    rollout, controls = rollout_of(net, policy=policy), controls_of(actions(33))
    clip = generate(rollout, steer)
    levels, noise = FewSteps().levels, KeyedNoise((11, 12))
    x0 = known = IMAGE
    for block in (1, 2):
        at = range(4 * block - 3, 4 * block + 1)
        like = known.new_zeros(2, 4, 2, 6, 10)
        for step, level in enumerate(levels):
            sigma = torch.full((2, 4), level, dtype=torch.float64)
            drawn = noise(block=block, step=step, like=like)
            xt = drawn if step == 0 else add_noise(x0, drawn, sigma=sigma)
            # the clean past passes through the network again for every step
            memory = Memory(rollout.memory.plan, batch=2, dtype=torch.float64)
            for b in range(block):
                own = memory.plan.block(b)
                _, fresh = net(
                    known[:, own.start : own.stop], sigma=torch.zeros(2, len(own)), text=TEXT,
                    controls=part(controls, own), memory=memory.view(fresh=True),
                )  # fmt: skip
                memory.commit(fresh)
            velocity, _ = net(xt, sigma=sigma, text=TEXT, controls=part(controls, at), memory=memory.view())
            x0 = x0_of(xt, velocity, sigma=sigma)
        known = torch.cat([known, x0], dim=1)
    torch.testing.assert_close(clip, known, rtol=0, atol=1e-10)


def test_noise_belongs_to_key_block_and_step_and_not_to_the_place_in_the_batch():
    both = generate(rollout_of(), actions())
    second = generate(rollout_of(batch=1, keys=(12,)), actions()[1:], image=IMAGE[1:], text=TEXT[1:])
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-10)
    like, noise = torch.zeros(1, 4, 2, 6, 10), KeyedNoise((11,))
    draws = [noise(block=b, step=s, like=like) for b in (1, 2) for s in (0, 1)]
    assert all((a - b).abs().max() > 1 for i, a in enumerate(draws) for b in draws[:i])


def test_changed_actions_leave_earlier_blocks_bit_identical():
    changed = actions()
    changed[:, 17:33] += 1
    a, b = generate(rollout_of(), actions()), generate(rollout_of(), changed)
    assert torch.equal(a[:, :5], b[:, :5])
    assert (a[:, 5:9] - b[:, 5:9]).abs().max() > 1e-4 and (a[:, 9:] - b[:, 9:]).abs().max() > 1e-4


def test_what_is_committed_changes_what_follows_but_not_the_first_block():
    clean, last = (generate(rollout_of(context=c), actions()) for c in ("clean", "last_step"))
    assert torch.equal(clean[:, :5], last[:, :5])
    assert (clean[:, 5:] - last[:, 5:]).abs().max() > 1e-4


@pytest.mark.parametrize(("context", "passes"), [("clean", 1 + 3 * 5), ("last_step", 1 + 3 * 4)])
def test_the_last_steps_keys_and_values_save_a_pass(context, passes):
    net, seen = network(), []
    net.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    generate(rollout_of(net, context=context), actions())
    assert len(seen) == passes and seen[0] == 1


def test_the_prompt_may_change_between_blocks():
    other = normal(2, 3, 6, seed=10)
    rollout = rollout_of()
    rollout.prefill(IMAGE, actions()[:, :1], text=TEXT)
    texts = [TEXT, other, TEXT]
    changed = list(rollout(actions()[:, 1:].split(16, dim=1), text=texts))
    same = generate(rollout_of(), actions())
    assert torch.equal(changed[0].latents, same[:, 1:5])
    assert (changed[1].latents - same[:, 5:9]).abs().max() > 1e-4


def test_word_ids_are_prompts_too():
    ids = torch.tensor([[5, 9, 0], [7, 0, 0]])
    net = network(words=True)
    read = generate(rollout_of(net), actions(), text=ids)
    torch.testing.assert_close(read, generate(rollout_of(net), actions(), text=net.embed(ids)))


@pytest.mark.parametrize("context", ["clean", "last_step"])
def test_prefilled_blocks_are_remembered_as_generated_ones_are(context):
    generated = generate(rollout_of(context=context), actions())
    rollout = rollout_of(context=context)
    rollout.prefill(generated[:, :5], actions()[:, :17], text=TEXT)
    continued = rollout.step(actions()[:, 17:33], text=TEXT)
    error = (continued.latents - generated[:, 5:9]).abs().max()
    if context == "clean":
        assert error <= 1e-10
    else:  # the last step's input can't be known from its output: it is noised afresh to that level
        assert error > 1e-6


def test_true_blocks_are_noised_to_the_level_at_which_generated_ones_are_committed_and_the_image_is_not():
    net, passes, true = network(), [], normal(2, 5, 2, 6, 10)
    net.register_forward_pre_hook(
        lambda module, given, named: passes.append((given[0], named["sigma"])), with_kwargs=True
    )
    rollout_of(net, context="last_step").prefill(true, actions()[:, :17], text=TEXT)
    (image, image_sigma), (block, sigma) = passes
    assert torch.equal(image, true[:, :1]) and not image_sigma.any()
    assert (sigma == 0.625).all()
    drawn = KeyedNoise((11, 12))(block=1, step=3, like=block)
    assert torch.equal(block, add_noise(true[:, 1:], drawn, sigma=sigma))


def test_a_memory_that_chooses_by_pose_is_told_where_each_latent_ends():
    policy = Compressed(window=4, schedule=(1, 3, 2, 3), max_latents=13)
    rollout = rollout_of(policy=policy, endless=True, steps=1)
    generate(rollout, actions(17))
    poses = torch.stack([rollout.memory._poses[i] for i in range(5)], dim=1)
    assert torch.equal(poses, integrate(actions(17))[:, ::4])  # frames 0, 4, 8, 12 and 16


def test_prefilling_at_once_or_in_parts_is_the_same():
    generated, results = generate(rollout_of(), actions()), []
    for cuts in ((9,), (1, 4, 4), (5, 4)):
        rollout, start = rollout_of(), 0
        for size in cuts:
            frames = slice(max(0, 4 * start - 3), 4 * (start + size) - 3)
            rollout.prefill(generated[:, start : start + size], actions()[:, frames], text=TEXT)
            start += size
        results.append(rollout.step(actions()[:, 33:], text=TEXT).latents)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_controls_are_those_of_the_whole_stream():
    rollout = rollout_of()
    rollout.prefill(IMAGE, actions()[:, :1], text=TEXT)
    blocks = list(rollout(actions()[:, 1:].split(16, dim=1), text=TEXT))
    whole = controls_of(actions())
    assert (torch.cat([b.controls.poses for b in blocks], 1) - whole.poses[:, 1:]).abs().max() <= 1e-9
    assert torch.equal(torch.cat([b.controls.actions for b in blocks], 1), whole.actions[:, 1:])


def test_a_fork_goes_its_own_way_and_a_reset_starts_again():
    rollout = rollout_of()
    whole = generate(rollout, actions())
    rollout.reset()
    rollout.prefill(IMAGE, actions()[:, :1], text=TEXT)
    rollout.step(actions()[:, 1:17], text=TEXT)
    fork = rollout.fork()
    other = fork.step(actions(16, seed=4), text=TEXT)
    mine = rollout.step(actions()[:, 17:33], text=TEXT)
    assert torch.equal(mine.latents, whole[:, 5:9]) and (other.latents - mine.latents).abs().max() > 1e-4
    assert torch.equal(rollout.step(actions()[:, 33:], text=TEXT).latents, whole[:, 9:])


@pytest.mark.parametrize("context", ["clean", "last_step"])
@pytest.mark.parametrize(
    "policy", [Full(), SHORT, Compressed(window=4, schedule=(1, 2), max_latents=9)], ids=str
)
def test_a_block_is_committed_again_in_one_pass_from_what_was_committed(policy, context):
    first, second = (rollout_of(policy=policy, context=context) for _ in range(2))
    passes = []
    for rollout in (first, second):
        rollout.prefill(IMAGE, actions()[:, :1], text=TEXT)
    second.net.register_forward_hook(lambda *given: passes.append(1))
    for stretch in actions()[:, 1:].split(16, dim=1)[:2]:
        block = first.step(stretch, text=TEXT)
        again = second.again(first.context, stretch, text=TEXT)
        assert torch.equal(again.latents, block.latents) and again.index == block.index
        assert torch.equal(again.controls.poses, block.controls.poses)
    assert len(passes) == 2
    last = actions()[:, 33:]
    assert torch.equal(first.step(last, text=TEXT).latents, second.step(last, text=TEXT).latents)


def test_what_cannot_be_committed_again_is_refused():
    rollout = rollout_of()
    with pytest.raises(ValueError, match="No block was generated yet: step first"):
        _ = rollout.context
    with pytest.raises(
        ValueError, match="Block 0 is 1 latents of 1 frames, after an image; got 1 latents and 1"
    ):
        rollout.again(IMAGE, actions(1), text=TEXT)
    rollout.prefill(IMAGE, actions(1), text=TEXT)
    with pytest.raises(ValueError, match=r"Block 1 is 4 latents of 16 frames.*got 2 latents and 16 frames"):
        rollout.again(normal(2, 2, 2, 6, 10), actions(16), text=TEXT)
    assert rollout.memory.latents == 1


@pytest.mark.parametrize(
    "policy", [SHORT, Compressed(window=4, schedule=(1, 3, 2, 3), max_latents=9)], ids=["fixed", "by pose"]
)
def test_a_stream_that_was_walked_and_drawn_before_is_the_same(policy):
    stepped = generate(rollout_of(policy=policy, context="last_step"), actions())
    noise, like = KeyedNoise((11, 12)), stepped[:, :4]
    steps = [[noise(block=i, step=step, like=like) for step in range(4)] for i in (1, 2, 3)]
    rollout = rollout_of(policy=policy, context="last_step")
    rollout.noise = DrawnNoise(torch.stack([torch.stack(block) for block in steps]))
    walked, _ = walk(actions(), device="cpu")
    true, rest = walked.cut(frames=1, latents=1)
    rollout.prefill(IMAGE, true, text=TEXT)
    again = []
    while rest.frames:
        stretch, rest = rest.cut(frames=16, latents=4)
        again.append(rollout.step(stretch, text=TEXT).latents)
    assert torch.equal(torch.cat([IMAGE, *again], dim=1), stepped)
    with pytest.raises(ValueError, match="walked before, or replayed, up to here: walk the"):
        rollout.step(actions()[:, 33:], text=TEXT)


def test_an_endless_stream_runs_on_a_bounded_memory():
    policy = Compressed(window=4, schedule=(1, 3, 2, 3), max_latents=13)
    rollout = rollout_of(policy=policy, endless=True, steps=1)
    rollout.prefill(IMAGE, actions()[:, :1], text=TEXT)
    size = rollout.memory.nbytes
    blocks = list(rollout(actions(16 * 12).split(16, dim=1), text=TEXT))
    assert blocks[-1].index == 12 and rollout.memory.nbytes == size
    assert all(block.latents.isfinite().all() for block in blocks)


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["clean", "last_step"])
@pytest.mark.parametrize("exit_step", [0, 2, 3])
@pytest.mark.parametrize(
    "policy", [SHORT, Compressed(window=4, schedule=(1, 2), max_latents=9)], ids=["S", "max"]
)
def test_a_replay_computes_the_exit_step_of_every_block_again(context, exit_step, policy):
    rollout = rollout_of(context=context, exit_step=exit_step, policy=policy)
    clip = generate(rollout, actions())
    traces = rollout.traces
    assert [t.block for t in traces] == [1, 2, 3]
    assert all(t.sigma == rollout.sampler.levels[exit_step] for t in traces)
    scored = torch.cat([t.x0 for t in traces], 1)
    assert torch.equal(scored, clip[:, 1:]) == (exit_step == 3)
    rollout.reset()
    rollout.prefill(IMAGE, actions()[:, :1], text=TEXT)
    for trace, x0 in rollout.replay(traces):
        torch.testing.assert_close(x0, trace.x0, rtol=0, atol=1e-10)


def test_a_replay_has_gradients_of_each_block_and_holds_no_other():
    net = network()
    rollout = rollout_of(net, exit_step=3)
    generate(rollout, actions())
    traces = rollout.traces
    net.requires_grad_(True)
    rollout.reset()
    rollout.prefill(IMAGE, actions()[:, :1], text=TEXT)
    for _, x0 in rollout.replay(traces):
        net.zero_grad()
        x0.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    assert not rollout.memory._stored.k.requires_grad


def test_without_an_exit_step_nothing_is_kept():
    rollout = rollout_of()
    generate(rollout, actions())
    assert rollout.traces == ()


def test_a_rollout_builds_no_graph():
    rollout = rollout_of(network().requires_grad_(True), exit_step=3)
    assert not generate(rollout, actions()).requires_grad
    assert not any(t.xt.requires_grad or t.x0.requires_grad for t in rollout.traces)


# -- errors --------------------------------------------------------------------------------------------------


def test_calls_that_cannot_work_are_refused_before_anything_is_committed():
    rollout = rollout_of()
    with pytest.raises(ValueError, match="starts from an image: prefill"):
        rollout.step(actions(16), text=TEXT)
    with pytest.raises(ValueError, match="3 latents must be the image and whole blocks of 4; use 1 or 5"):
        rollout.prefill(normal(2, 3, 2, 6, 10), actions(9), text=TEXT)
    with pytest.raises(ValueError, match="5 latents from latent 0 on take 17 frames of actions; got 16"):
        rollout.prefill(normal(2, 5, 2, 6, 10), actions(16), text=TEXT)
    assert rollout.memory.latents == 0
    rollout.prefill(IMAGE, actions(1), text=TEXT)
    with pytest.raises(ValueError, match="A block takes 16 frames of actions; got 8"):
        rollout.step(actions(8), text=TEXT)
    assert rollout.memory.latents == 1


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="steps=0"):
        FewSteps(steps=0)
    with pytest.raises(ValueError, match=r"shift=0\.5"):
        FewSteps(shift=0.5)
    with pytest.raises(ValueError, match="context='noised' must be"):
        FewSteps(context="noised")
    used = rollout_of()
    used.prefill(IMAGE, actions(1), text=TEXT)
    with pytest.raises(ValueError, match="holds 1 latents of another stream"):
        Rollout(network(), used.memory, noise=KeyedNoise((1, 2)))
    stretched = network()
    stretched.dit.config = dataclasses.replace(stretched.dit.config, rope_factor=3.0)
    with pytest.raises(ValueError, match=r"rope_factor=3\.0 and the memory's 1\.0 must be equal"):
        rollout_of(stretched)
    with pytest.raises(ValueError, match="exit_step=4 must be one of the 4 steps, 0 to 3"):
        rollout_of(exit_step=4)


def test_a_replay_out_of_order_is_refused():
    rollout = rollout_of(exit_step=0)
    generate(rollout, actions())
    with pytest.raises(ValueError, match="The trace is of block 1; the memory is at block 4"):
        next(rollout.replay(rollout.traces))
