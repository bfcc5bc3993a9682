import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from relic.data import WorldDataModule
from relic.modules import CausalInit
from relic.nn.checkpoints import WeightsSource, load_weights, read_header
from relic.nn.student import FewSteps, StudentConfig
from relic.ops.flow import add_noise, velocity_of
from relic.ops.losses import ode_regression_loss
from relic.ops.randomness import derive_seed, keyed_generator, keyed_normal
from relic.ops.retention import Compressed, Window
from relic.ops.words import word_ids
from relic.parallel import Compute
from relic.rollout import KeyedNoise
from relic.types import Batch, ClipSpec, Mixed
from tests.data.recordings import latents_sample, write_dataset
from tests.modules.recording import Emulated, NothingFromTheHost
from tests.modules.test_student import vae  # noqa: F401 - a fixture
from tests.modules.test_teacher import teacher, trainer
from tests.worlds import NANO, NANO_WORDS, RAYED

CLIP = ClipSpec(height=32, width=48, horizons=(25,), block_latents=2)  # the image and three blocks
POLICY = Compressed(window=2, schedule=(1, 2))


def causal_init(**changes: object) -> CausalInit:
    settings = {
        "net": NANO, "clip": CLIP, "words": NANO_WORDS, "policy": POLICY, "ema_decay": None,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3), **changes,
    }  # fmt: skip
    return CausalInit(**settings)  # type: ignore[arg-type]


def end_of(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (7, 4, 4, 6) that brighten with the action, and actions (25, 13)."""
    generator = keyed_generator("solution", index)
    speed, place = float(torch.rand((), generator=generator)), torch.randn(4, 4, 6, generator=generator)
    actions = torch.zeros(25, 13)
    actions[1:, 9] = speed
    return torch.stack([place * (1 + 0.3 * speed * t) for t in range(7)]), actions


def batch(indices: list[int], *, levels: tuple[float, ...] = FewSteps().levels, pool: int = 10_000) -> Batch:
    """A batch of solutions that go straight from noise to one of `pool` ends."""
    ends, actions = (torch.stack(x) for x in zip(*(end_of(i % pool) for i in indices), strict=True))
    noise = keyed_normal(indices, "solution", like=ends)
    states = [add_noise(ends, noise, sigma=torch.tensor(level)) for level in (*levels, 0.0)]
    trajectory = torch.stack(states, dim=1)
    trajectory[:, :, 0] = ends[:, None, 0]
    return Batch(
        latents=None, trajectory=trajectory, video=None, actions=actions,
        text=torch.stack([word_ids("a red room", length=6) for _ in indices]),
        d_bar=torch.ones(len(indices), dtype=torch.float64),
        key=torch.tensor([derive_seed(1, i) for i in indices]),
    )  # fmt: skip


class Solutions(lightning.LightningDataModule):
    """A foreign data module; its `pool` ends come again and again, each time from other noise."""

    def __init__(self, *, batches: int = 8, pool: int = 10_000, global_batch: int = 4) -> None:
        super().__init__()
        self.batches, self.pool, self.global_batch = batches, pool, global_batch

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        starts = range(0, self.batches * self.global_batch, self.global_batch)
        places = [range(start + rank, start + self.global_batch, world) for start in starts]
        rows = [batch(list(each), pool=self.pool) for each in places]
        return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def perturbed(module: CausalInit) -> CausalInit:
    """Fresh outputs are zero and would hide everything."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


class Recorder(torch.nn.Module):
    """Stands in for the network to see what it is given, and answers as if it knew the ends."""

    def __init__(self, ends: torch.Tensor) -> None:
        super().__init__()
        self.ends = ends

    def forward(self, latents, *, sigma, text, controls, memory):
        self.latents, self.sigma, self.controls, self.memory = latents, sigma, controls, memory
        ends = self.ends[:, list(memory.times)]
        level = sigma[..., None, None, None]
        return torch.where(level > 0, (latents - ends) / level.clamp(min=1e-6), 0.0), ()


@pytest.mark.parametrize("context", ["clean", "last_step"])
@pytest.mark.parametrize(
    ("forcing", "noisy_blocks", "blocks", "clean", "start"),
    [
        ("hybrid", 2, 3, 3, 3), ("hybrid", 1, 3, 5, 5), ("hybrid", 2, 1, 1, 1), ("hybrid", 5, 3, 1, 1),
        ("diffusion", 2, 3, 1, 1), ("teacher", 2, 3, 5, 1), ("teacher", 2, 1, 1, 1),
    ],
)  # fmt: skip
def test_noisy_blocks_are_states_at_their_own_levels_behind_what_generation_caches(
    context, forcing, noisy_blocks, blocks, clean, start
):
    sampler = FewSteps(context=context)
    module = causal_init(forcing=forcing, noisy_blocks=noisy_blocks, sampler=sampler)
    data, total = batch([0, 1]), 1 + 2 * blocks
    ends = data.trajectory[:, -1]
    recorder, steps = Recorder(ends), module.drawn_levels(data)
    loss = module.regression_loss(recorder, module.given(data, blocks=blocks, steps=steps))
    assert loss.shape == (2,) and float(loss.max()) < 1e-9
    frames, again = 4 * total - 3, 4 * clean - 3  # teacher forcing has those of the clean part again
    packed = again + frames - 1 if forcing == "teacher" else frames
    assert recorder.controls.actions.shape[1] == packed
    levels = torch.tensor(sampler.levels)
    for row in range(2):
        for place, time in enumerate(range(start, total), clean):
            number = int(steps[row, (time - 1) // 2])
            assert torch.equal(recorder.latents[row, place], data.trajectory[row, number, time])
            assert recorder.sigma[row, place] == levels[number]
    assert torch.equal(recorder.latents[:, 0], ends[:, 0]) and not recorder.sigma[:, 0].any()
    assert recorder.latents.shape[1] == clean + total - start
    if context == "clean":
        assert torch.equal(recorder.latents[:, :clean], ends[:, :clean])
        assert not recorder.sigma[:, :clean].any()
    else:
        noise = module.normal(data.key, "context", like=ends)[:, 1:clean]
        renoised = add_noise(ends[:, 1:clean], noise, sigma=torch.tensor(0.625))
        torch.testing.assert_close(recorder.latents[:, 1:clean], renoised)
        assert recorder.sigma[:, 1:clean].eq(0.625).all()


@pytest.mark.parametrize(("forcing", "clean", "start"), [("teacher", 5, 1), ("hybrid", 3, 3)])
def test_states_of_true_clips_are_noised_to_the_levels_and_lead_to_the_truth(forcing, clean, start):
    module, data = causal_init(forcing=forcing), batch([0, 1])
    truth = data.trajectory[:, -1]
    data = data._replace(latents=truth, trajectory=None)
    steps = module.drawn_levels(data)
    given = module.given(data, blocks=3, steps=steps)
    assert torch.equal(given.clean, truth[:, :clean]) and torch.equal(given.end, truth[:, start:])
    assert given.scored.all()
    levels = torch.tensor(module.student.sampler.levels)[steps].repeat_interleave(2, 1)[:, start - 1 :]
    assert torch.equal(given.sigma, levels)
    level = levels[..., None, None, None]
    noise = (given.noisy - (1 - level) * truth[:, start:]) / level
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    other = module.given(data, blocks=2, steps=steps)  # the same sample, of which less is used
    shared = other.noisy.shape[1] if forcing == "teacher" else 0
    torch.testing.assert_close(other.noisy[:, :shared], given.noisy[:, :shared])
    assert float(module.regression_loss(Recorder(truth), given).max()) < 1e-9


def test_the_loss_is_the_error_of_x0_over_the_noisy_latents():
    module, data = causal_init(), batch([0, 1])

    class Zero(Recorder):
        def forward(self, latents, **given):
            return 0 * super().forward(latents, **given)[0], ()

    steps = torch.zeros(2, 3, dtype=torch.long)
    loss = module.regression_loss(Zero(data.trajectory[:, -1]), module.given(data, blocks=3, steps=steps))
    noise, end = data.trajectory[:, 0, 3:], data.trajectory[:, -1, 3:]
    torch.testing.assert_close(loss, velocity_of(end, noise).square().mean((1, 2, 3, 4)))


@pytest.mark.parametrize(("forcing", "first"), [("hybrid", 3), ("teacher", 1)])
def test_latents_that_a_solution_was_given_are_out_of_the_loss(forcing, first):
    module, data = causal_init(forcing=forcing), batch([0, 1, 2])
    data.trajectory[1, :, :5] = data.trajectory[1, -1:, :5]  # given the image and two blocks of two
    data.trajectory[2] = data.trajectory[2, -1:]  # given all
    given = module.given(data, blocks=3, steps=torch.zeros(3, 3, dtype=torch.long))
    scored = torch.ones(3, 7)
    scored[1, :5], scored[2] = 0, 0
    assert torch.equal(given.scored, scored[:, first:])
    assert torch.equal(given.sigma, scored[:, first:])  # step 0 is at level 1, what was given is clean
    known = given.scored == 0
    assert torch.equal(given.noisy[known], given.end[known])
    error = (x := torch.rand(2, *given.end.shape))[0].sub(x[1]).square().mean((2, 3, 4))
    loss = ode_regression_loss(*x, weight=given.scored)
    torch.testing.assert_close(loss[1], error[1, 5 - first :].mean())
    assert loss[2] == 0
    mean = module.learn(given, parts=1)
    torch.testing.assert_close(mean, module.regression_loss(module.trained, given)[:2].mean().detach())


@pytest.mark.parametrize("forcing", ["hybrid", "teacher"])
def test_gradients_reach_the_keys_and_values_of_the_clean_blocks(forcing):
    module, data = perturbed(causal_init(forcing=forcing, noisy_blocks=1)), batch([0, 1])
    seen: list[torch.Tensor] = []

    def keep(layer, args, out):
        out.retain_grad()
        seen.append(out)

    attention = module.trained.dit.blocks[-1].self_attn  # of the last layer: only noisy queries read on
    attention.k.register_forward_hook(keep)
    attention.v.register_forward_hook(keep)
    steps = torch.tensor([[0, 1, 2], [3, 2, 1]])
    module.regression_loss(module.trained, module.given(data, blocks=3, steps=steps)).mean().backward()
    assert len(seen) == 2
    for out in seen:
        tokens = out.grad.flatten(1, -2)  # 2x3 a latent; those of block 1 are older than the window
        assert tokens[:, 6:18].abs().amax(-1).gt(0).all()


def test_what_the_memory_holds_of_the_clean_blocks_changes_the_loss():
    module, data = perturbed(causal_init(noisy_blocks=1)), batch([0, 1])
    given = {"blocks": 3, "steps": torch.zeros(2, 3, dtype=torch.long)}
    ends = data.trajectory.clone()
    ends[:, -1, 1] += 1.0  # an end that is in no target
    with torch.no_grad():
        loss = module.regression_loss(module.trained, module.given(data, **given))
        changed = module.regression_loss(
            module.trained, module.given(data._replace(trajectory=ends), **given)
        )
    assert (changed - loss).abs().min() > 1e-6


def test_levels_belong_to_sample_and_block_and_all_occur():
    module = causal_init()
    whole = module.drawn_levels(batch(list(range(200))))
    assert whole.shape == (200, 3)
    assert torch.equal(module.drawn_levels(batch([7, 3])), whole[[7, 3]])
    counts = torch.stack([(whole == level).sum(0) for level in range(4)])
    assert counts.min() > 25
    assert (whole[:, 0] != whole[:, 1]).float().mean() > 0.6  # three quarters, if blocks are independent


def test_block_counts_are_uniform_and_the_same_for_every_sample_of_a_batch():
    class At(CausalInit):
        batch_index = 0

    module, drawn = At(net=NANO, clip=CLIP, words=NANO_WORDS, policy=POLICY), []
    for index in range(600):
        module.batch_index = index
        drawn.append(module.drawn_blocks(batch([index])))
        assert module.drawn_blocks(batch([0, 1])) == drawn[-1]
    assert set(drawn) == {1, 2, 3} and min(drawn.count(blocks) for blocks in (1, 2, 3)) > 150


def test_teacher_forcing_uses_whole_clips():
    module = causal_init(forcing="teacher")
    states = batch([0])
    assert module.drawn_blocks(states) == module.blocks_of(states) == 3
    given = module.given(states, blocks=3, steps=module.drawn_levels(states))
    assert given.noisy.shape[1] == given.clean.shape[1] + 1 == 6  # every block, and all before the last


class Diary(CausalInit):
    """Writes down what each batch was and which part of it was used."""

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert self.batch_index == self.trainer.datamodule.batch_index
        self.entries.append((self.batch_index, self.drawn_blocks(batch), batch.key.tolist()))
        return super().training_step(batch, batch_idx)


def written(root: Path, folder: Path, *, resume: Path | None = None, **settings: object) -> Diary:
    clip = ClipSpec(height=32, width=32, horizons=(17, 25), block_latents=2)
    module = Diary(net=NANO, clip=clip, words=NANO_WORDS, policy=POLICY, ema_decay=None)
    module.entries = []
    data = WorldDataModule(
        root=str(root), clip=clip, content="trajectory", global_batch=2, batches_per_epoch=4, workers=0,
        validation_scenes=1, evaluation_scenes=1, validation_windows=2, words=6,
    )  # fmt: skip
    trainer(folder, **{"max_steps": -1, "max_epochs": 3, **settings}).fit(module, data, ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def solutions(tmp_path_factory) -> Path:
    """Six solutions of 25 frames at the default levels, in six scenes."""
    levels = FewSteps().levels
    samples = [
        (f"w{i}", latents_sample(25, seed=i, scene=f"s{i}", states=5, levels=levels, size=32))
        for i in range(6)
    ]
    return write_dataset(tmp_path_factory.mktemp("solutions"), samples)


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_run_stopped_inside_an_epoch_goes_on_to_the_same_weights_with_the_same_block_counts(
    solutions, tmp_path, stop
):
    whole = written(solutions, tmp_path / "whole")
    assert [index for index, *_ in whole.entries] == list(range(12))
    assert len({blocks for _, blocks, _ in whole.entries}) > 1
    saver = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=stop, save_top_k=-1)
    first = written(solutions, tmp_path / "first", max_steps=stop, max_epochs=-1, callbacks=[saver])
    rest = written(solutions, tmp_path / "rest", resume=tmp_path / "middle.ckpt")
    assert first.entries + rest.entries == whole.entries
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name


@pytest.mark.parametrize("forcing", ["hybrid", "teacher", "diffusion"])
@pytest.mark.parametrize("context", ["clean", "last_step"])
def test_every_forcing_trains(tmp_path, forcing, context):
    module = causal_init(forcing=forcing, sampler=FewSteps(context=context), compute=Compute(keep="inputs"))
    before = {name: value.clone() for name, value in module.trained.state_dict().items()}
    trainer(tmp_path, max_steps=3).fit(module, Solutions())
    after = module.trained.state_dict()
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.9 * len(before)
    losses = module.level_losses(batch([0, 1]))
    assert list(losses) == ["1.000", "0.938", "0.833", "0.625"]
    assert all(bool(loss.isfinite()) for loss in losses.values())


def rollout_error(module: CausalInit, data: Batch) -> float:
    """Squared error of a rollout from the image against the ends of the solutions."""
    ends = data.trajectory[:, -1]
    noise = KeyedNoise(tuple(data.key.tolist()))
    made = module.extend(ends[:, :1], actions=data.actions, text=data.text, noise=noise)
    return float((made - ends)[:, 1:].square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("context", ["clean", "last_step"])
def test_it_learns_a_few_solutions_and_its_rollout_reaches_their_ends(tmp_path, context):
    module, data = causal_init(sampler=FewSteps(context=context)), batch(list(range(4)))
    before = torch.stack(list(module.level_losses(data).values())).mean(), rollout_error(module, data)
    trainer(tmp_path, max_steps=200).fit(module, Solutions(batches=200, pool=4))
    after = torch.stack(list(module.level_losses(data).values())).mean(), rollout_error(module, data)
    print(f"loss {before[0]:.3f} -> {after[0]:.3f}, rollout {before[1]:.3f} -> {after[1]:.3f}")
    assert after[0] < 0.3 * before[0] and after[1] < 0.3 * before[1]


def test_validation_logs_the_loss_by_level_and_the_psnr_of_a_rollout(solutions, tmp_path, vae):  # noqa: F811
    clip = ClipSpec(height=32, width=32, horizons=(25,), block_latents=2)
    module = causal_init(clip=clip, vae=vae, rollout_blocks=2)
    data = WorldDataModule(
        root=str(solutions), clip=clip, content="trajectory", global_batch=2, workers=0, words=6,
        validation_scenes=2, evaluation_scenes=1, validation_windows=2,
    )  # fmt: skip
    (logged,) = trainer(tmp_path).validate(module, data, verbose=False)
    levels = {f"val/loss_ode_sigma_{level}" for level in ("1.000", "0.938", "0.833", "0.625")}
    assert set(logged) == {"val/loss_ode", "val/psnr_rollout", *levels}
    assert logged["val/loss_ode"] == pytest.approx(sum(logged[name] for name in levels) / 4)
    assert 0 < logged["val/psnr_rollout"] < 100


def test_a_rollout_goes_on_from_what_each_solution_was_given(vae, monkeypatch):  # noqa: F811
    module, data = causal_init(vae=vae, rollout_blocks=1), batch([0, 1, 2])
    module.configure_model()
    data.trajectory[1, :, :5] = data.trajectory[1, -1:, :5]
    seen = []

    def perfect(prefix, *, actions, text, noise):
        seen.append((prefix.shape[:2], actions.shape[1], noise.keys))
        rows = [data.key.tolist().index(key) for key in noise.keys]
        return data.trajectory[rows, -1, : 1 + (actions.shape[1] - 1) // 4]

    monkeypatch.setattr(module, "extend", perfect)
    assert module.rollout_psnr(data) == pytest.approx(148.1, abs=0.1)  # of equal videos
    keys = data.key.tolist()
    assert seen == [((2, 1), 9, (keys[0], keys[2])), ((1, 5), 25, (keys[1],))]


def test_it_starts_from_a_teacher_and_writes_a_student(tmp_path):
    trainer(tmp_path / "teacher", max_steps=1).fit(first := teacher(clip=CLIP), LatentsOf())
    source = WeightsSource(path=str(tmp_path / "teacher" / "teacher.safetensors"))
    module = causal_init(init=source, seed=3)
    module.configure_model()
    for name, value in first.averaged.state_dict().items():
        assert torch.equal(module.trained.state_dict()[name], value)
    trainer(tmp_path, max_steps=2).fit(module, Solutions())
    path = tmp_path / "student.safetensors"
    student = StudentConfig.from_header(read_header(path, kind="student")["config"])
    assert student == module.student
    net = student.build()
    load_weights(net, WeightsSource(path=str(path)), kind="student")
    for name, value in module.averaged.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
    onward = causal_init(init=WeightsSource(path=str(path)), policy=Window(latents=2))
    onward.configure_model()
    for name, value in onward.trained.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), "a student may go on with another memory"


class LatentsOf(Solutions):
    """The ends of the solutions, as a teacher is fitted on."""

    def train_dataloader(self) -> DataLoader[Batch]:
        data = batch([0, 1])
        return DataLoader([data._replace(latents=data.trajectory[:, -1], trajectory=None)], batch_size=None)  # type: ignore[arg-type]


def test_what_does_not_fit_is_named(vae, tmp_path):  # noqa: F811
    for changes, message in (
        ({"forcing": "student"}, r"forcing='student' must be one of teacher, diffusion, hybrid"),
        ({"noisy_blocks": 0}, r"noisy_blocks=0 must be at least 1"),
        ({"rollout_blocks": 4}, r"rollout_blocks=4 must be between 0 and the clip's 3"),
        ({"policy": Window(latents=3)}, "multiple of block_latents=2"),
        ({"clip": replace(CLIP, horizons=(89,))}, r"that of 21 latents, but the longest horizon has 23"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_init(**changes)
    trainer(tmp_path, max_steps=1).fit(teacher(clip=CLIP), LatentsOf())
    source = WeightsSource(path=str(tmp_path / "teacher.safetensors"))
    with pytest.raises(ValueError, match="Set net to the sizes of the file"):
        causal_init(init=source, net=replace(NANO, depth=3)).configure_model()
    with pytest.raises(ValueError, match=r"rope_factor=1.0, this network has 2.0.*init.rope_factor: restate"):
        causal_init(init=source, net=replace(NANO, rope_factor=2.0)).configure_model()
    with pytest.raises(ValueError, match="holds a tiny_vae, but a teacher or a student is needed"):
        trainer(tmp_path).fit(causal_init(init=WeightsSource(path=vae)), Solutions())
    mixed = Mixed(steered=batch([0]), plain=batch([1]))
    with pytest.raises(ValueError, match=r"takes no plain video.*unset data.plain"):
        causal_init().training_step(mixed, 0)
    with pytest.raises(ValueError, match=r"4 steps need trajectories of 5 states.* the batch has 3"):
        trainer(tmp_path).fit(causal_init(), Foreign(levels=(1.0, 0.5)))


class Foreign(Solutions):
    """Solutions at levels that it does not say."""

    def __init__(self, *, levels: tuple[float, ...]) -> None:
        super().__init__()
        self.own = levels

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader([batch([0], levels=self.own)], batch_size=None)  # type: ignore[arg-type]


def test_solutions_at_other_levels_are_refused_before_the_first_step(solutions, tmp_path):
    clip = ClipSpec(height=32, width=32, horizons=(25,), block_latents=2)
    data = WorldDataModule(
        root=str(solutions), clip=clip, content="trajectory", global_batch=2, workers=0, words=6,
        validation_scenes=1, evaluation_scenes=1, validation_windows=2,
    )  # fmt: skip
    for sampler in (FewSteps(shift=1.0), FewSteps(steps=2)):
        with pytest.raises(
            ValueError, match=r"levels 1.0000, 0.9375, 0.8333, 0.6250; the student denoises at"
        ):
            trainer(tmp_path).fit(causal_init(clip=clip, sampler=sampler), data)


SCRIPT = """
import sys
import torch
from lightning import Callback, Trainer
from relic.parallel.strategy import ShardedStrategy
from relic.rollout import KeyedNoise
from tests.modules.test_causal_init import Solutions, batch, causal_init

devices, strategy, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
strategies = {"auto": "auto", "ddp": "ddp", "sharded": ShardedStrategy()}

class Record(Callback):
    losses, blocks = [], []
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.blocks.append(module.drawn_blocks(batch))
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))
    def on_train_end(self, trainer, module):
        data = batch([0, 1])
        noise = KeyedNoise(tuple(data.key.tolist()))
        image = module.clean_latents(data)[:, :1]
        self.made = module.extend(image, actions=data.actions, text=data.text, noise=noise)

record = Record()
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy=strategies[strategy], max_steps=8, logger=False,
    enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, callbacks=record,
    use_distributed_sampler=False, default_root_dir=out, gradient_clip_val=1.0,
)
trainer.fit(causal_init(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4), ema_decay=0.9), Solutions())
kept = [None] * devices
if devices > 1:
    torch.distributed.all_gather_object(kept, record.blocks)
if trainer.is_global_zero:
    assert all(blocks == record.blocks for blocks in kept if devices > 1)
    torch.save((record.losses, record.blocks, record.made), f"{out}/{strategy}.pt")
"""


@pytest.mark.slow
def test_two_processes_equal_one_data_parallel_and_sharded(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    for devices, strategy in ((1, "auto"), (2, "ddp"), (2, "sharded")):
        command = [sys.executable, str(script), str(devices), strategy, str(tmp_path)]
        subprocess.run(command, check=True, env=env, timeout=240)
    losses, blocks, made = torch.load(tmp_path / "auto.pt")
    assert len(losses) == 8 and len(set(blocks)) > 1
    for strategy in ("ddp", "sharded"):
        other_losses, other_blocks, other_made = torch.load(tmp_path / f"{strategy}.pt")
        assert other_blocks == blocks and other_losses == pytest.approx(losses, abs=1e-5)
        torch.testing.assert_close(other_made, made, atol=1e-4, rtol=0)


# -- recording -----------------------------------------------------------------------------------------------


def fitted(root, *, recorded: bool = False, graphs: bool = False, net=NANO, **settings) -> torch.Tensor:
    """Fit for 10 steps of two batches each, with validations between -> all weights."""
    module = causal_init(net=net, ema_decay=0.5, warmup_steps=3, cuda_graphs=graphs)
    module.recorder = Emulated(module.parameters) if recorded else None
    rows = [batch([2 * i, 2 * i + 1]) for i in range(20)]
    trainer(
        root, max_steps=10, accumulate_grad_batches=2, gradient_clip_val=0.1, val_check_interval=4, **settings
    ).fit(module, DataLoader(rows, batch_size=None), DataLoader(rows[:1], batch_size=None))
    if recorded:
        assert module.recorder.calls == ["learn"] * 20
    return torch.cat([v.flatten().cpu() for v in module.state_dict().values()])


def test_steps_that_are_recorded_train_as_others_do_validations_or_not(tmp_path):
    assert torch.equal(fitted(tmp_path / "a"), fitted(tmp_path / "b", recorded=True))


def read_all(q, k, v, *, block_mask, kernel_options):
    """Stand for a kernel: use all that it is given."""
    tiles = block_mask.kv_num_blocks.sum() + block_mask.full_kv_indices.sum()
    return q + (k + v).sum(2, keepdim=True) * tiles


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("net", [NANO, RAYED], ids=["plain", "rays"])
@pytest.mark.parametrize("forcing", ["hybrid", "diffusion", "teacher"])
def test_a_step_asks_nothing_of_the_host(forcing, net, at_once, monkeypatch):
    """On the meta device, where a value that is asked for is an error."""
    monkeypatch.setattr("relic.nn.attention._takes_segments", lambda q: at_once)  # as a GPU does
    monkeypatch.setattr("relic.nn.attention._compiled", lambda: read_all)  # that kernel knows no meta device
    module = causal_init(forcing=forcing, net=net)
    module.configure_model()
    data = batch([0, 1])
    given = [module.given(data, blocks=blocks, steps=module.drawn_levels(data)) for blocks in (1, 2, 3)]
    module.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # not known there
    for each in tree_map(lambda x: x.to("meta"), given):
        module.learn(each, parts=1)  # tables of positions are made once
        with NothingFromTheHost():
            loss = module.learn(each, parts=2)
        assert loss.device.type == "meta" and not loss.requires_grad
    assert all(p.grad is not None for p in module.trained.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("net", [NANO, RAYED], ids=["plain", "rays"])
def test_steps_are_replayed_as_they_were_recorded(net, tmp_path):
    settings = {"accelerator": "gpu", "devices": 1, "net": net}
    plain = fitted(tmp_path / "a", **settings)
    torch.testing.assert_close(fitted(tmp_path / "b", graphs=True, **settings), plain, atol=1e-4, rtol=1e-3)
