"""What the ways of taking a plain teacher to actions do to its weights."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningDataModule
from torch.utils.data import DataLoader

from relic.modules import TeacherExtension
from relic.nn.checkpoints import WeightsSource
from relic.nn.control import is_control
from relic.nn.tuning import ControlFirst, LowRank
from relic.types import Mixed
from tests.modules.test_teacher import Recorder, teacher, trainer
from tests.worlds import NANO, LatentWorld, batch

PLAIN = replace(NANO, control=None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The file of a plain teacher."""
    root = tmp_path_factory.mktemp("plain")
    trainer(root, max_steps=4, enable_checkpointing=False).fit(teacher(net=PLAIN), LatentWorld())
    return WeightsSource(path=str(root / "teacher.safetensors"), missing=("control",))


class Kept(Callback):
    """Keeps the trained weights after every step, under their own names."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append({name: value.clone() for name, value in module.trained.state_dict().items()})


def fit(root, module, *, steps=4, data=None):
    kept = Kept()
    run = trainer(root, max_steps=steps, callbacks=kept, enable_checkpointing=False)
    run.fit(module, data or LatentWorld())
    return kept.steps


def test_a_network_with_control_starts_as_the_plain_one_it_came_from(plain):
    data, told = batch([0, 1, 2]), teacher(init=plain)
    untold = TeacherExtension.from_file(plain.path)
    assert untold.controls(data) is None and told.controls(data) is not None
    assert told.bucket_losses(data) == untold.bucket_losses(data)
    assert told.bucket_losses(data) == told.bucket_losses(data, control="none")


def test_a_plain_teacher_exports_what_wan_would_call_its_keys(plain):
    module = TeacherExtension.from_file(plain.path)
    assert module.net_config.control is None
    assert not [name for name in module.trained.state_dict() if is_control(name)]


@pytest.mark.parametrize("first_latent", ["clean", "noised", "unscored"])
def test_a_noised_first_latent_is_like_the_others(first_latent):
    module, recorder, data = teacher(), Recorder(), batch([0, 1])
    sigma = torch.tensor([0.7, 0.2])
    loss = module.denoising_loss(
        recorder, data, sigma=sigma, purpose="noise", control="none", first_latent=first_latent
    )
    expected = sigma[:, None].expand(2, 3).clone()
    expected[:, 0] *= first_latent != "clean"
    assert torch.equal(recorder.sigma, expected) and recorder.controls is None
    error = (module.normal(data.key, "noise", like=data.latents) - data.latents).square().mean((2, 3, 4))
    torch.testing.assert_close(loss, (error if first_latent == "noised" else error[:, 1:]).mean(1))


def test_control_first_leaves_the_rest_bit_identical_until_its_turn(plain, tmp_path):
    module = teacher(init=plain, tuning=ControlFirst(control_steps=3))
    before = {name: value.clone() for name, value in module.trained.state_dict().items()}
    steps = fit(tmp_path, module, steps=4)
    for weights in steps[:3]:
        changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
        assert changed and all(is_control(name) for name in changed)
    changed = {name for name, value in steps[3].items() if not torch.equal(value, before[name])}
    assert len([name for name in changed if not is_control(name)]) > 20


def test_a_low_rank_teacher_exports_a_plain_one(plain, tmp_path):
    module = teacher(init=plain, tuning=LowRank(rank=2, alpha=4.0), ema_decay=None)
    start = {name: value.clone() for name, value in module.plain_weights(module.trained).items()}
    learnt = fit(tmp_path, module)[-1]
    exported = TeacherExtension.from_file(str(tmp_path / "teacher.safetensors"))
    weights = exported.trained.state_dict()
    assert weights.keys() == teacher().trained.state_dict().keys()
    moved = 0
    for name, value in weights.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in learnt and stem != name:
            a, b = (learnt[f"{stem}.lora_{which}.default.weight"] for which in "AB")
            torch.testing.assert_close(value, start[name] + 2.0 * b @ a, msg=name)
            moved += not torch.equal(value, start[name])
        elif is_control(name):
            assert torch.equal(value, learnt[name])
        else:
            assert torch.equal(value, start[name]), name
    assert moved == 20
    data = batch([0, 1])
    for bucket, loss in exported.bucket_losses(data).items():
        torch.testing.assert_close(loss, module.bucket_losses(data)[bucket])


def test_the_average_of_a_low_rank_teacher_is_that_of_its_merged_weights(plain, tmp_path):
    module = teacher(init=plain, tuning=LowRank(rank=2), ema_decay=0.9)
    mean = {name: value.double() for name, value in module.plain_weights(module.trained).items()}
    for n, weights in enumerate(fit(tmp_path, module), 1):
        module.trained.load_state_dict(weights)
        decay = min(0.9, (1 + n) / (10 + n))
        for name, value in module.plain_weights(module.trained).items():
            mean[name] = decay * mean[name] + (1 - decay) * value.double()
    averaged = module.averaged.state_dict()
    assert averaged.keys() == mean.keys()
    for name, value in mean.items():
        torch.testing.assert_close(averaged[name].double(), value, atol=1e-6, rtol=1e-5, msg=name)


def test_a_low_rank_run_resumes_bit_for_bit(plain, tmp_path):
    def low_rank():
        return teacher(init=plain, tuning=LowRank(rank=2))

    straight, rest = low_rank(), low_rank()
    fit(tmp_path / "a", straight, steps=4)
    first = trainer(tmp_path / "b", max_steps=2, enable_checkpointing=False)
    first.fit(low_rank(), LatentWorld())
    first.save_checkpoint(tmp_path / "half.ckpt")

    class Rest(LatentWorld):
        def train_dataloader(self):
            return self.batches_from(2 * self.global_batch, 8)

    run = trainer(tmp_path / "c", max_steps=4, enable_checkpointing=False)
    run.fit(rest, Rest(), ckpt_path=tmp_path / "half.ckpt")
    for name, value in straight.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name


class MixedWorld(LightningDataModule):
    def train_dataloader(self):
        rows = [Mixed(batch([i, i + 1, i + 2]), batch([100 + i])) for i in range(0, 40, 4)]
        return DataLoader(rows, batch_size=None)


def test_a_mixed_batch_costs_the_mean_over_its_samples_the_plain_ones_without_controls():
    module = teacher(prompt_dropout=0.0)
    for parameter in module.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    mixed = Mixed(batch([0, 1, 2]), batch([7]))
    total = module.training_step(mixed, 0)
    plain_sigma = module.uniform(mixed.plain.key, "sigma")
    settings = {"sigma": plain_sigma, "purpose": "noise"}
    alone = module.denoising_loss(module.trained, mixed.plain, control="none", **settings)
    told = module.denoising_loss(module.trained, mixed.plain, **settings)
    assert logged["train/loss_flow_plain"] == pytest.approx(float(alone)) != pytest.approx(float(told))
    assert float(total) == pytest.approx((3 * logged["train/loss_flow"] + float(alone)) / 4)
    nonsense = mixed._replace(plain=mixed.plain._replace(actions=mixed.plain.actions + 5))
    assert torch.equal(module.training_step(nonsense, 0), total)


def test_it_fits_on_mixed_batches(plain, tmp_path):
    steps = fit(tmp_path, teacher(init=plain), data=MixedWorld())
    assert len(steps) == 4 and not torch.equal(
        steps[0]["dit.blocks.0.ffn.0.weight"], steps[3]["dit.blocks.0.ffn.0.weight"]
    )


DDP_SCRIPT = """
import sys
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader
from relic.nn.tuning import ControlFirst, LowRank
from relic.types import Mixed
from tests.modules.test_teacher import teacher
from tests.worlds import batch

devices, name, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
TUNINGS = {"control_first": ControlFirst(control_steps=2), "low_rank": LowRank(rank=2)}

class MixedWorld(LightningDataModule):
    def train_dataloader(self):
        mine = slice(self.trainer.global_rank, None, self.trainer.world_size)
        steered = [list(range(i, i + 4))[mine] for i in range(0, 40, 4)]
        plain = [[100 + i, 101 + i][mine] for i in range(0, 40, 4)]
        return DataLoader([Mixed(batch(s), batch(p)) for s, p in zip(steered, plain)], batch_size=None)

module = teacher(tuning=TUNINGS[name], optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=4, logger=False,
    enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    use_distributed_sampler=False, default_root_dir=out,
)
trainer.fit(module, MixedWorld())
if trainer.is_global_zero:
    torch.save(module.state_dict(), f"{out}/{name}-{devices}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["control_first", "low_rank"])
def test_two_processes_tune_as_one_does(tmp_path, tuning):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    script = tmp_path / "ddp.py"
    script.write_text(DDP_SCRIPT)
    for devices in (1, 2):
        command = [sys.executable, str(script), str(devices), tuning, str(tmp_path)]
        subprocess.run(command, check=True, env=env, timeout=240)
    one, two = (torch.load(tmp_path / f"{tuning}-{n}.pt") for n in (1, 2))
    assert one.keys() == two.keys()
    assert max(float((one[name].double() - two[name].double()).abs().max()) for name in one) <= 1e-5
