import dataclasses
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from lightning import Callback
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from relic.modules import SelfForcing
from relic.modules.scores import check_teacher
from relic.modules.self_forcing import Turns
from relic.nn.checkpoints import WeightsSource, read_header, save_weights
from relic.nn.memory import Full, Memory, Window
from relic.nn.student import FewSteps
from relic.ops.actions import controls_of
from relic.ops.dmd import with_gradient
from relic.ops.flow import x0_of
from relic.ops.retention import Compressed
from relic.parallel import Compute
from relic.rollout import KeyedNoise
from relic.stages import Checkpoint
from relic.types import ClipSpec, Mixed
from tests.modules.distillation import CLIP, STUDENT, Rollouts, batch, self_forcing, write_files
from tests.modules.recording import Emulated, NothingFromTheHost
from tests.modules.test_teacher import trainer
from tests.nn.streams import part
from tests.worlds import NANO, RAYED


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, WeightsSource]:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module", params=[NANO, RAYED], ids=["plain", "rays"])
def worlds(request, tmp_path_factory) -> dict[str, Any]:
    """Files of networks without and with rays, and their sizes."""
    config = dataclasses.replace(STUDENT, net=request.param)
    return {**write_files(tmp_path_factory.mktemp("worlds"), config=config), "net": request.param}


def built(files: dict[str, WeightsSource], **changes: Any):
    module = self_forcing(files, **changes)
    module.configure_model()
    module.log_dict = lambda *args, **kwargs: None  # no trainer to log to
    return module


class Record(Callback):
    """Keeps what each batch logs, and the weights before it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer, module):
        original = module.log_dict

        def spy(values, **settings):
            self.logged[-1].update({k: float(v) for k, v in values.items()})
            original(values, **settings)

        module.log_dict = spy

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.logged.append({})
        self.weights.append({k: v.detach().clone() for k, v in module.state_dict().items()})


# -- replayed back-propagation -------------------------------------------------------------------------------

LONG = ClipSpec(height=32, width=48, horizons=(33,), block_latents=2)  # four blocks


def one_graph(module, data, prefix: torch.Tensor, traces) -> torch.Tensor:
    """Every block's scored step, its memory filled anew from the image on: one graph over all of them."""
    net, controls, predicted = module.trained, controls_of(data.actions), []
    spans = [module.plan.block(index) for index in range(traces[0].block)]
    contexts = [(prefix[:, span.start : span.stop], 0.0) for span in spans]
    contexts += [(t.context, t.context_sigma) for t in traces]
    for trace in traces:
        memory = Memory(module.plan, batch=len(prefix), dtype=prefix.dtype)
        for index, (latents, level) in enumerate(contexts[: trace.block]):
            steer, sigma = part(controls, module.plan.block(index)), prefix.new_full(latents.shape[:2], level)
            with torch.no_grad():
                view = memory.view(fresh=True)
                _, fresh = net(latents, sigma=sigma, text=data.text, controls=steer, memory=view)
            memory.commit(fresh)
        steer = part(controls, module.plan.block(trace.block))
        sigma = prefix.new_full(trace.xt.shape[:2], trace.sigma)
        velocity, _ = net(trace.xt, sigma=sigma, text=data.text, controls=steer, memory=memory.view())
        predicted.append(x0_of(trace.xt, velocity, sigma=sigma))
    return torch.cat(predicted, dim=1)


@pytest.mark.parametrize(
    "policy", [Full(), Window(latents=4), Compressed(window=2, schedule=(1, 2))], ids=["full", "window", "S"]
)
@pytest.mark.parametrize(("exit_step", "prefix_share"), [(None, 0.0), (0, 0.0), (None, 1.0)])
@pytest.mark.parametrize("replay_by", ["block", "clip"])
def test_the_replayed_gradient_is_that_of_one_graph_with_detached_history(
    worlds, policy, exit_step, prefix_share, replay_by
):
    how = {"exit_step": exit_step, "prefix_share": prefix_share, "replay_by": replay_by}
    module = built(worlds, policy=policy, clip=LONG, **how)
    net, data = module.trained.double(), batch([0, 1], clip=LONG)
    data = data._replace(actions=data.actions.double())
    given = module.given(data)
    given = given._replace(prefix=given.prefix.double(), noise=given.noise.double())
    assert given.known == (5 if prefix_share else 1)
    x0, traces = module.roll_out(given, exit_step=module.scored_step())
    pull = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for at, again in module.replay(given, traces):
        torch.testing.assert_close(again, x0[:, at], rtol=0, atol=1e-12)
        with_gradient(again, pull[:, at]).backward()
    replayed = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    whole = one_graph(module, data, given.prefix, traces)
    (whole * pull[:, given.known :]).sum().backward()
    for name, parameter in net.named_parameters():
        error = (parameter.grad - replayed[name]).norm() / parameter.grad.norm()
        assert error <= 1e-10, name


def test_no_gradient_passes_from_a_block_to_an_earlier_one(files):
    module = built(files, clip=LONG)
    given = module.given(batch([0], clip=LONG))
    _, traces = module.roll_out(given, exit_step=1)
    traces = tuple(t._replace(xt=t.xt.requires_grad_(), context=t.context.requires_grad_()) for t in traces)
    for number, (_, again) in enumerate(module.replay(given, traces)):
        inputs = [x for t in traces for x in (t.xt, t.context)]
        grads = torch.autograd.grad(again.sum(), inputs, allow_unused=True)
        reached = [i for i, g in enumerate(grads) if g is not None and g.any()]
        assert reached == [2 * number]


def test_changed_actions_leave_the_gradients_of_earlier_blocks_bit_identical(files):
    module, data = built(files, clip=LONG), batch([0], clip=LONG)
    changed = data._replace(actions=data.actions.clone())
    changed.actions[:, 17:25] += 1.0  # of the third block
    grads = []
    for steer in (data, changed):
        given = module.given(steer)
        _, traces = module.roll_out(given, exit_step=1)
        parts = module.replay(given, traces)
        net = list(module.trained.dit.blocks.parameters())
        grads.append([torch.autograd.grad(x.sum(), net) for _, x in parts])
    same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(*grads, strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("replay_by", ["block", "clip"])
def test_under_autocast_the_replay_still_has_gradients(files, replay_by):
    module, data = built(files, replay_by=replay_by), batch([0, 1])
    grads = []
    for half in (False, True):
        module.trained.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            given = module.given(data)
            memory = module.rollout(module.trained, noise=KeyedNoise((0, 1)), like=given.prefix).memory
            assert memory.dtype == (torch.bfloat16 if half else torch.float32)
            _, traces = module.roll_out(given, exit_step=1)
            for _, again in module.replay(given, traces):
                again.float().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in module.trained.parameters()]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.99


@pytest.mark.parametrize("replay_by", ["block", "clip"])
def test_checkpointed_blocks_replay_to_the_same_gradient(files, replay_by):
    grads, data = [], batch([0, 1])
    for keep in ("all", "inputs"):
        module = built(files, compute=Compute(keep=keep), replay_by=replay_by)
        given = module.given(data)
        _, traces = module.roll_out(given, exit_step=1)
        for _, again in module.replay(given, traces):
            again.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in module.trained.parameters()]))
    torch.testing.assert_close(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("replay_by", ["block", "clip"])
def test_compiled_blocks_serve_all_passes_of_a_turn(worlds, monkeypatch, replay_by):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    module = built(worlds, clip=LONG, replay_by=replay_by, compute=Compute(compile_blocks=True))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for module.prefix_share in (0.0, 1.0):
            given = module.given(batch([0, 1], clip=LONG))
            x0, traces = module.roll_out(given, exit_step=1)
            for at, again in module.replay(given, traces):
                torch.testing.assert_close(again, x0[:, at])
                again.sum().backward()


# -- scores --------------------------------------------------------------------------------------------------


def test_critic_and_teacher_start_equal_so_without_guidance_nothing_pulls(files):
    data, generated = batch([0, 1]), batch([2, 3]).latents
    plain, guided = built(files, guidance=1.0), built(files, guidance=4.0)
    assert not plain.gradient(generated, plain.given(data))[0].any()
    assert guided.gradient(generated, guided.given(data))[0][:, 1:].any()


def test_a_small_step_moves_clips_from_what_the_critic_sees_towards_what_the_teacher_would_have(files):
    module = built(files)
    given = module.given(batch([0, 1]))
    x0, traces = module.roll_out(given, exit_step=1)
    pull, _ = module.gradient(x0, given)
    for at, again in module.replay(given, traces):
        with_gradient(again, pull[:, at]).backward()
    with torch.no_grad():
        for parameter in module.trained.parameters():
            parameter -= 1e-6 * parameter.grad
    moved, _ = module.roll_out(given, exit_step=1)
    assert float(((moved - x0) * pull).sum()) < 0


@pytest.mark.parametrize(("prefix_share", "known"), [(0.0, 1), (1.0, 5)])
def test_all_networks_see_what_is_given_clean_and_no_loss_counts_it(files, prefix_share, known):
    module, seen = built(files, clip=LONG, prefix_share=prefix_share), []
    data = batch([0, 1], clip=LONG)
    given = module.given(data)
    assert torch.equal(given.prefix, data.latents[:, :known])

    def note(net, arguments, named):
        seen.append((arguments[0][:, :known], named["sigma"]))

    for net in (module.fake, module.real.net, module.trained):
        net.register_forward_pre_hook(note, with_kwargs=True)
    x0, _ = module.roll_out(given, exit_step=1)
    told = []  # the student is given block after block
    while len(told) < 1 + (known - 1) // 2:
        told.append(seen[len(told)][0])
        assert not seen[len(told) - 1][1].any()
    assert torch.equal(torch.cat(told, 1), given.prefix)
    seen.clear()
    module.gradient(x0, given)
    module.critic_loss(x0, given)
    assert len(seen) == 4
    for first, sigma in seen:
        assert torch.equal(first, given.prefix) and not sigma[:, :known].any()
        assert (sigma[:, known:] == sigma[:, -1:]).all() and sigma[:, known:].min() >= 0.02
    pull, _ = module.gradient(x0, given)
    assert not pull[:, :known].any()


@pytest.mark.parametrize(("prefix_share", "known"), [(0.0, 1), (1.0, 5)])
def test_the_critics_loss_leaves_out_what_is_given(files, prefix_share, known):
    module = built(files, clip=LONG, prefix_share=prefix_share)
    given = module.given(batch([0, 1], clip=LONG))
    x0, _ = module.roll_out(given, exit_step=1)
    with torch.no_grad():
        for parameter in module.fake.parameters():
            parameter.zero_()  # velocity 0
    expected = (given.score_noise - x0)[:, known:].square().mean()
    torch.testing.assert_close(module.critic_loss(x0, given), expected)


def test_what_is_scored_is_the_exit_steps_prediction(files, monkeypatch):
    data = batch([0, 1])
    last, first = built(files), built(files, exit_step=0)
    for module, step in ((last, 1), (first, 0)):
        x0, traces = module.roll_out(module.given(data), exit_step=module.scored_step())
        assert all(t.sigma == module.student.sampler.levels[step] for t in traces)
        assert torch.equal(x0[:, 1:], torch.cat([t.x0 for t in traces], 1))
    drawn = built(files, exit_step="random")
    steps = set()
    for index in range(20):
        monkeypatch.setattr(SelfForcing, "batch_index", index)
        steps.add(drawn.scored_step())
    assert steps == {0, 1}


def test_a_share_of_the_batches_goes_on_from_half_the_clip(files, monkeypatch):
    data, lengths = batch([0], clip=LONG), []
    module, again = (built(files, clip=LONG, prefix_share=0.3) for _ in range(2))
    for index in range(200):
        monkeypatch.setattr(SelfForcing, "batch_index", index)
        lengths.append(module.drawn_prefix(data))
        assert again.drawn_prefix(data) == lengths[-1]  # and so after a restart, and on every rank
    assert set(lengths) == {1, 5} and 0.2 < lengths.count(5) / 200 < 0.4


# -- recording -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "replay_by"), [("clean", "block"), ("last_step", "block"), ("clean", "clip")]
)
@pytest.mark.parametrize("grid", [(32, 48), (48, 80)], ids=["whole cells", "ragged cells"])
def test_a_turn_asks_nothing_of_the_host(worlds, monkeypatch, context, replay_by, grid):
    """On the meta device, where a value that is asked for is an error."""
    clip = dataclasses.replace(LONG, height=grid[0], width=grid[1])
    sampler = FewSteps(steps=2, context=context)
    module = built(worlds, clip=clip, guidance=4.0, sampler=sampler, replay_by=replay_by)
    starts = []
    for module.prefix_share in (0.0, 1.0):
        starts.append(tree_map(lambda x: x.to("meta"), module.given(batch([0, 1], clip=clip))))
    for owner in (module, module.real):
        owner.to("meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # not known on the meta device
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(module, "_backward", lambda loss: loss.backward())
    for turn, given in product((module.student_turn, module.critic_turn), starts):
        turn(given, exit_step=1)  # tables of positions are made once
        with NothingFromTheHost():
            told = turn(given, exit_step=1)
        assert all(x.device.type == "meta" and not x.ndim for x in told.values())
    assert all(p.grad is not None for p in (*module.trained.parameters(), *module.fake.parameters()))


class Validated(Rollouts):
    def val_dataloader(self):
        return DataLoader([batch([90, 91])], batch_size=None)


def test_turns_that_are_recorded_train_as_others_do_validations_or_not(tmp_path):
    weights = []
    clip = dataclasses.replace(LONG, horizons=(17,))
    files = write_files(tmp_path, prefix_share=0.5)
    for recorded in (False, True):
        module = self_forcing(files, clip=clip, accumulate=2, prefix_share=0.5)
        module.recorder = Emulated(module.parameters) if recorded else None
        settings = {"max_steps": 13, "val_check_interval": 3}
        trainer(tmp_path / str(recorded), **settings).fit(module, Validated(batches=26))
        weights.append(torch.cat([v.flatten() for v in module.state_dict().values()]))
    assert module.recorder.calls.count("student_turn") == 8 and len(module.recorder.calls) == 26
    assert len(module.recorder.made) == 4  # each turn, from the image and from more
    assert torch.equal(*weights)


def test_recording_is_for_one_cuda_device_and_a_memory_that_plans_ahead(files, tmp_path):
    with pytest.raises(ValueError, match=r"one CUDA device; this run has 1 of type cpu\. Set cuda_graphs to"):
        trainer(tmp_path).fit(self_forcing(files, cuda_graphs=True), Rollouts())
    policy = Compressed(window=2, schedule=(1, 2), max_latents=5)
    with pytest.raises(ValueError, match=r"set policy\.max_latents to null, or cuda_graphs to false"):
        self_forcing(files, cuda_graphs=True, policy=policy)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("exit_step", "replay_by", "precision"),
    [(None, "block", 32), ("random", "block", 32), (None, "clip", 32), (None, "clip", "bf16-mixed")],
)
def test_turns_are_replayed_as_they_were_recorded(worlds, tmp_path, exit_step, replay_by, precision):
    modules, logs = [], []
    for graphs in (False, True):
        record = Record()
        module = self_forcing(
            worlds, cuda_graphs=graphs, exit_step=exit_step, clip_norm=1.0, replay_by=replay_by
        )
        settings = {"max_steps": 20, "accelerator": "gpu", "val_check_interval": 5, "precision": precision}
        trainer(tmp_path / str(graphs), callbacks=[record], **settings).fit(module, Validated(batches=20))
        modules.append(torch.cat([v.flatten() for v in module.state_dict().values()]))
        logs.append(record.logged)
    torch.testing.assert_close(*modules, atol=1e-4, rtol=1e-3)
    for plain, recorded in zip(*logs, strict=True):
        assert recorded == pytest.approx(plain, rel=1e-2, abs=1e-4)


# -- turns ---------------------------------------------------------------------------------------------------


def test_the_student_steps_after_every_fifth_of_the_critic_once_it_had_its_first():
    turns = Turns(ratio=5, critic_first=100)
    own = [step for step in range(1600) if turns.of(step) == "student"]
    assert own[:3] == [105, 111, 117] and len(own) == 250 == turns.student_steps(1600)


def test_ratio_and_critic_only_start_are_kept_and_only_whose_turn_it_is_moves(files, tmp_path):
    module, record = self_forcing(files, accumulate=2), Record()
    trainer(tmp_path, max_steps=7, callbacks=[record]).fit(module, Rollouts(batches=14))
    assert [int(r["step/student"]) for r in record.logged[1::2]] == [0, 0, 0, 1, 1, 1, 2]
    assert [int(r["step/critic"]) for r in record.logged[1::2]] == [1, 2, 3, 3, 4, 5, 5]
    students = [False, False, False, True, False, False, True]
    assert ["train/grad_norm_student" in r for r in record.logged[1::2]] == students
    after = [*record.weights[1:], module.state_dict()]
    moved = [
        {k.split(".")[0] for k in before if not torch.equal(before[k], now[k])}
        for before, now in zip(record.weights, after, strict=True)
    ]
    critic, student = {"critic"}, {"net", "ema"}
    assert moved[0::2] == [set()] * 7  # gradients of the first of two batches wait
    assert moved[1::2] == [critic, critic, critic, student, critic, critic, student]


def test_accumulated_halves_step_as_the_whole_batch_does(files, tmp_path):
    weights = []
    for batches, parts in ((4, 1), (8, 2)):
        module = self_forcing(files, accumulate=parts, critic_optimizer=sgd, optimizer=sgd, clip_norm=0.1)
        data = Rollouts(batches=batches, global_batch=4 // parts)
        trainer(tmp_path / str(parts), max_steps=4).fit(module, data)
        weights.append(torch.cat([v.flatten() for v in module.state_dict().values()]))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def test_gradients_are_clipped_to_the_norm_of_each_network(files, tmp_path):
    record = Record()
    module = self_forcing(files, critic_optimizer=sgd, optimizer=sgd, clip_norm=1e-3)
    trainer(tmp_path, max_steps=4, callbacks=[record]).fit(module, Rollouts())
    after = [*record.weights[1:], module.state_dict()]
    for before, now, logged in zip(record.weights, after, record.logged, strict=True):
        name = "net" if "train/grad_norm_student" in logged else "critic"
        step = torch.cat([(now[k] - before[k]).flatten() for k in now if k.startswith(f"{name}.")])
        assert float(step.norm()) == pytest.approx(0.5e-3, rel=1e-3)
        assert logged["train/grad_norm_" + {"net": "student"}.get(name, name)] > 4e-3


def test_everything_worth_watching_is_logged(files, tmp_path):
    record = Record()
    trainer(tmp_path, max_steps=4, callbacks=[record]).fit(self_forcing(files), Rollouts())
    critic, student = record.logged[0], record.logged[3]
    both = {"train/colour_drift", "step/student", "step/critic"}
    assert {*both, "train/loss_critic", "train/grad_norm_critic"} == set(critic)
    own = {"train/loss_student", "train/loss_ratio", "train/error_ratio", "train/grad_norm_student"}
    assert {*both, *own} == set(student)
    assert all(torch.isfinite(torch.tensor(list(r.values()))).all() for r in record.logged)


def test_the_moving_average_follows_the_students_steps_only(files, tmp_path):
    module, record = self_forcing(files), Record()
    trainer(tmp_path, max_steps=7, callbacks=[record]).fit(module, Rollouts())
    assert module.ema_updates == 2
    name = "dit.head.head.weight"
    start, first = record.weights[0], record.weights[4]
    decay = 2 / 11  # young: (1 + 1) / (10 + 1)
    expected = decay * start[f"ema.{name}"] + (1 - decay) * first[f"net.{name}"]
    torch.testing.assert_close(first[f"ema.{name}"], expected)


# -- checkpoints ---------------------------------------------------------------------------------------------


def test_the_teacher_is_frozen_and_in_no_checkpoint(files, tmp_path):
    module = self_forcing(files)
    run = trainer(tmp_path, max_steps=4)
    run.fit(module, Rollouts())
    assert all(not p.requires_grad and p.grad is None for p in module.real.net.parameters())
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert {k.split(".")[0] for k in state["state_dict"]} == {"net", "ema", "critic"}
    parameters = sum(p.numel() for p in module.trained.parameters())
    # three networks and, of two of them, two moments each: seven times the student, without the teacher
    assert (tmp_path / "a.ckpt").stat().st_size < 7.5 * 4 * parameters + 2e5


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_resumes_bit_for_bit(files, tmp_path, stop):
    straight, stopped, rest = (self_forcing(files, exit_step="random") for _ in range(3))
    trainer(tmp_path / "a", max_steps=7).fit(straight, Rollouts())
    first = trainer(tmp_path / "b", max_steps=stop)
    first.fit(stopped, Rollouts())
    first.save_checkpoint(tmp_path / "half.ckpt")
    data = Rollouts(start=stop, batches=12 - stop)
    trainer(tmp_path / "c", max_steps=7).fit(rest, data, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for name, value in straight.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name


def test_no_checkpoint_is_written_between_accumulated_gradients(files, tmp_path):
    waiting: list[int] = []

    class Spy(Checkpoint):
        def _save_checkpoint(self, trainer, path):
            waiting.append(module._waiting)
            super()._save_checkpoint(trainer, path)

    for steps, resume in ((2, None), (3, tmp_path / "last.ckpt")):
        module = self_forcing(files, accumulate=2)
        keeper = Spy(dirpath=tmp_path, every_n_train_steps=1, save_last=True)
        run = trainer(tmp_path, max_steps=steps, callbacks=[keeper])
        run.fit(module, Rollouts(start=4 if resume else 0), ckpt_path=resume, weights_only=False)
    assert len(waiting) == 6 and not any(waiting)  # a file and its copy after each of three steps


def test_the_next_horizon_starts_from_the_exported_average(files, tmp_path):
    first = self_forcing(files)
    trainer(tmp_path, max_steps=4).fit(first, Rollouts())
    longer = dataclasses.replace(STUDENT, clip=LONG)
    others = write_files(tmp_path / "long", config=longer)
    source = WeightsSource(path=str(tmp_path / "student.safetensors"))
    second = self_forcing({**others, "init": source}, clip=LONG)
    second.configure_model()
    for name, value in first.averaged.state_dict().items():
        assert torch.equal(second.trained.state_dict()[name], value)


def test_scores_may_have_another_rope_factor_than_the_student(files, tmp_path):
    stretched = dataclasses.replace(STUDENT, net=dataclasses.replace(STUDENT.net, rope_factor=2.0))
    student = write_files(tmp_path / "long", config=stretched)["init"]
    module = self_forcing({**files, "init": student}, net=stretched.net, teacher_rope_factor=1.0)
    trainer(tmp_path, max_steps=4).fit(module, Rollouts())
    factors = [n.dit.config.rope_factor for n in (module.trained, module.fake, module.real.net)]
    assert factors == [2.0, 1.0, 1.0]


# -- errors --------------------------------------------------------------------------------------------------


def test_a_teacher_that_does_not_fit_is_refused_before_any_step(files, tmp_path):
    wide = dataclasses.replace(STUDENT, net=dataclasses.replace(STUDENT.net, ffn=96))
    others = {"wide": wide, "long": dataclasses.replace(STUDENT, clip=LONG)}
    teachers = {k: write_files(tmp_path / k, config=c)["teacher"] for k, c in others.items()}
    for name, message in (
        ("wide", r"other sizes than the student: net.ffn is 96 there, 64 here"),
        ("long", r"clips of 32x48, 33 frames, this stage rolls out 32x48, 17 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            module = self_forcing({**files, "teacher": teachers[name]})
            trainer(tmp_path).fit(module, Rollouts())
    rays = dataclasses.replace(STUDENT, net=RAYED)
    given = write_files(tmp_path / "rays", config=rays)
    check_teacher(given["teacher"].path, rays, rope_factor=rays.net.rope_factor)
    with pytest.raises(ValueError, match=r"net.control is .*0\.75.* there, .*0\.0.* here"):
        check_teacher(given["teacher"].path, STUDENT, rope_factor=STUDENT.net.rope_factor)
    with pytest.raises(ValueError, match=r"net.rope_factor is 1\.0 there, 2\.0 here"):
        trainer(tmp_path).fit(self_forcing(files, teacher_rope_factor=2.0), Rollouts())
    with pytest.raises(ValueError, match="holds a student, but a teacher is needed"):
        trainer(tmp_path).fit(self_forcing({**files, "teacher": files["init"]}), Rollouts())
    with pytest.raises(ValueError, match=r"prefix_share=0\.5, but the teacher .* continues one image only"):
        trainer(tmp_path).fit(self_forcing(files, prefix_share=0.5), Rollouts())
    with pytest.raises(ValueError, match=r"prefix_share=1\.5 must be in \[0, 1\]"):
        self_forcing(files, prefix_share=1.5)
    with pytest.raises(ValueError, match="a clip of 9 frames has one block after the image"):
        self_forcing(files, clip=dataclasses.replace(CLIP, horizons=(9,)), prefix_share=0.5)


def test_a_student_that_generates_in_another_way_is_refused_before_any_step(files, tmp_path):
    for changes, message in (
        ({"policy": Window(latents=2)}, r"policy is Compressed.*there, Window"),
        ({"sampler": FewSteps(steps=2, shift=1.0)}, r"sampler is .*shift=5\.0.*there, .*shift=1\.0"),
        ({"sampler": FewSteps(steps=2, context="last_step")}, r"sampler is .*'clean'.*there, .*'last_step'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).fit(self_forcing(files, **changes), Rollouts())


def test_a_run_goes_on_with_the_teacher_it_was_started_with(files, tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.fit(self_forcing(files), Rollouts())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = {"teacher": WeightsSource(path=str(tmp_path / "teacher.safetensors"))}
    network = torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"]
    weights = {k.removeprefix("critic."): v for k, v in network.items() if k.startswith("critic.")}
    header = read_header(files["teacher"].path)["config"]
    save_weights(tmp_path / "teacher.safetensors", weights, kind="teacher", config=header)
    with pytest.raises(ValueError, match="started with another teacher"):
        trainer(tmp_path, max_steps=4).fit(
            self_forcing({**files, **other}), Rollouts(), ckpt_path=tmp_path / "a.ckpt", weights_only=False
        )


LAST_STEP = FewSteps(steps=2, context="last_step")
BY_POSE = Compressed(window=2, schedule=(1, 2), max_latents=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_step": 2}, "exit_step=2 must be one of the 2 steps, 0 to 1"),
        ({"exit_step": -1}, "exit_step=-1 must be"),
        ({"exit_step": "first"}, "exit_step='?first'? must be"),
        ({"policy": Window(latents=3)}, "A window of 3 latents must be a multiple of block_latents=2"),
        ({"critic_ratio": 0}, "critic_ratio=0 must be at least 1"),
        ({"critic_only_steps": -1}, "critic_only_steps=-1 must be at least 0"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"clip_norm": 0.0}, r"clip_norm=0\.0 must be positive"),
        ({"replay_by": "frame"}, "replay_by='?frame'? must be block or clip"),
        ({"replay_by": "clip", "sampler": LAST_STEP}, r"set sampler\.context to clean"),
        ({"replay_by": "clip", "policy": BY_POSE}, r"policy\.max_latents to null"),
    ],
)
def test_settings_that_cannot_work_are_refused(files, changes, message):
    with pytest.raises(ValueError, match=message):
        self_forcing(files, **changes)


def test_a_batch_of_another_horizon_or_of_plain_video_is_refused(files):
    with pytest.raises(ValueError, match=r"takes no plain video.*unset data\.plain"):
        built(files).given(Mixed(steered=batch([0]), plain=batch([1])))
    with pytest.raises(ValueError, match="actions of 33 frames; this stage rolls out 17"):
        built(files).given(batch([0], clip=LONG))


def test_gradients_that_are_scaled_are_refused(files, tmp_path, monkeypatch):
    module = self_forcing(files)
    run = trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(type(run), "scaler", object(), raising=False)
    with pytest.raises(ValueError, match="scales gradients, so that their norm means nothing"):
        run.fit(module, Rollouts())


def test_clips_of_the_other_shapes_are_what_the_world_expects():
    assert batch([0]).latents.shape[1:] == (5, 4, CLIP.latent_height, CLIP.latent_width)
