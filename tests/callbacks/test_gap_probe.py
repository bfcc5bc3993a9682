import copy
import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from relic.callbacks import GapProbe, HeldOut
from relic.data import WorldDataModule
from relic.data.schema import ACTIONS, dump_array, load_array
from relic.modules import TeacherExtension
from relic.nn.checkpoints import WeightsSource
from relic.types import ClipSpec
from tests.callbacks.test_sample_video import Foreign
from tests.data.recordings import latents_sample, write_dataset
from tests.worlds import NANO, NANO_WORDS

CLIP = ClipSpec(height=32, width=32, horizons=(9,), block_latents=2)


def latents(root: Path, *, first: int) -> Path:
    samples = [
        (f"walk{i}", latents_sample(9, seed=i, scene=f"scene{i}", size=32)) for i in range(first, first + 8)
    ]
    return write_dataset(root, samples)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    root = tmp_path_factory.mktemp("worlds")
    return latents(root / "plain", first=0), latents(root / "actions", first=8)


def teacher(**changes):
    settings = {
        "net": NANO, "clip": CLIP, "words": NANO_WORDS, "ema_decay": 0.5,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2), **changes,
    }  # fmt: skip
    return TeacherExtension(**settings)


def probe(worlds, **changes):
    plain, actions = (HeldOut(root=str(root), evaluation_scenes=0) for root in worlds)
    return GapProbe(plain, actions, **{"num_clips": 4, "batch": 3, "words": 6, **changes})


def fit(root, worlds, module, *callbacks, steps=4, **settings):
    data = WorldDataModule(
        root=str(worlds[1]), clip=CLIP, content="latents", global_batch=2, workers=0, words=6,
        batches_per_epoch=2, evaluation_scenes=0, validation_windows=2,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, callbacks=list(callbacks), use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        **{"logger": False, "enable_checkpointing": False, **settings},
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=settings.get("ckpt_path"))
    return trainer


@pytest.fixture(scope="module")
def pretrained(worlds, tmp_path_factory):
    """The file of a plain teacher, fitted without actions for a few steps."""
    root = tmp_path_factory.mktemp("pretrained")
    fit(root, worlds, teacher(net=replace(NANO, control=None), first_latent="noised"))
    return WeightsSource(path=str(root / "teacher.safetensors"), missing=("control",))


@pytest.fixture(scope="module")
def tuned(worlds, pretrained, tmp_path_factory):
    """A probed run from a plain teacher: its trainer, its probe, and the rows of its log."""
    root, callback = tmp_path_factory.mktemp("tuned"), probe(worlds)
    logger = CSVLogger(root, name="log", flush_logs_every_n_steps=1)
    trainer = fit(root, worlds, teacher(init=pretrained), callback, logger=logger)
    with Path(logger.experiment.metrics_file_path).open() as file:
        return trainer, callback, list(csv.DictReader(file))


def test_at_step_0_the_whole_prior_is_kept_and_control_gains_nothing(tuned):
    start = tuned[1].history[0]
    assert start["step"] == 0 and start["gap/prior_kept"] == 1.0
    assert start["gap/prior_loss"] == start["gap/prior_loss_start"] > 0
    assert start["gap/control_gain"] == 0.0 and start["gap/control_true"] > 0


def test_it_is_logged_at_the_start_and_on_validation_under_its_names(tuned):
    trainer, callback, rows = tuned
    assert [row["step"] for row in callback.history] == [0, 2, 4]
    assert [row["step"] for row in rows if row["gap/step0_base"]] == ["0"]
    assert float(rows[0]["gap/prior_kept"]) == 1.0
    names = {"prior_loss", "prior_loss_start", "prior_kept", "control_true", "control_shuffled"}
    for name in (*names, "control_gain", "prior_loss_sigma_0.75-1.00"):
        assert trainer.callback_metrics[f"gap/{name}"] == pytest.approx(callback.history[-1][f"gap/{name}"])
    assert not [name for name in trainer.callback_metrics if name.startswith("gap/step0")]


def test_kept_and_gain_follow_from_the_losses(tuned):
    for row in tuned[1].history:
        assert row["gap/prior_kept"] == row["gap/prior_loss_start"] / row["gap/prior_loss"]
        assert row["gap/control_gain"] == 1 - row["gap/control_true"] / row["gap/control_shuffled"]
        parts = [value for name, value in row.items() if name.startswith("gap/prior_loss_sigma")]
        assert len(parts) == 4 and row["gap/prior_loss"] == pytest.approx(sum(parts) / 4)
    assert row["gap/prior_kept"] != 1.0 and row["gap/control_gain"] != 0.0


def test_the_probe_leaves_training_bit_identical(worlds, pretrained, tmp_path):
    def final(name, *callbacks):
        module = teacher(init=pretrained)
        module.trained.dit.blocks[0].eval()  # an odd mode must come back too
        torch.manual_seed(3)
        fit(tmp_path / name, worlds, module, *callbacks)
        modes = [part.training for part in module.modules()]
        return module.state_dict(), torch.rand(1), modes

    weights, draw, modes = final("with", probe(worlds))
    other_weights, other_draw, other_modes = final("without")
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    assert torch.equal(draw, other_draw) and modes == other_modes


def test_a_network_that_ignores_controls_gains_nothing(worlds, tmp_path):
    callback = probe(worlds)
    fit(tmp_path, worlds, teacher(net=replace(NANO, control=None)), callback)
    assert callback.history[-1]["gap/prior_kept"] != 1.0
    assert [row["gap/control_gain"] for row in callback.history] == [0.0] * 3


def test_each_cost_of_the_start_is_measured_alone(worlds, pretrained, tmp_path):
    """Against losses computed here, from the same clips."""
    stretched = replace(NANO, rope_factor=3.0)
    source = replace(pretrained, rope_factor="restate")
    module, callback = teacher(net=stretched, init=source), probe(worlds, batch=4)
    fresh = copy.deepcopy(module)
    fit(tmp_path, worlds, module, callback, steps=1)
    plain = teacher(init=pretrained)
    clips, start = callback._clips["plain"], callback.history[0]

    def mean(model, first_latent):
        losses = model.bucket_losses(clips, control="none", first_latent=first_latent)
        return float(torch.stack(list(losses.values())).mean())

    base = mean(plain, "unscored")
    assert start["gap/step0_base"] == pytest.approx(base, rel=1e-6)
    assert start["gap/step0_clean_first"] == pytest.approx(mean(plain, "clean") - base, abs=1e-6)
    assert start["gap/step0_yarn"] == pytest.approx(mean(fresh, "unscored") - base, abs=1e-6)
    assert start["gap/step0_yarn"] != 0.0 and start["gap/step0_clean_first"] != 0.0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_start_is_kept_whole_in_the_precision_of_the_run(worlds, pretrained, tmp_path, precision, tuned):
    callback = probe(worlds)
    fit(tmp_path, worlds, teacher(init=pretrained), callback, steps=1, precision=precision)
    start, exact = callback.history[0], tuned[1].history[0]
    assert start["gap/prior_kept"] == 1.0 and start["gap/control_gain"] == 0.0
    assert start["gap/prior_loss"] != exact["gap/prior_loss"]
    assert start["gap/prior_loss"] == pytest.approx(exact["gap/prior_loss"], rel=0.02)


def test_validating_alone_measures_nothing(worlds, pretrained, tmp_path):
    callback = probe(worlds)
    trainer = fit(tmp_path, worlds, teacher(init=pretrained), callback)
    measured = len(callback.history)
    trainer.validate(teacher(init=pretrained), trainer.datamodule, verbose=False)
    assert len(callback.history) == measured and not [k for k in trainer.callback_metrics if "gap/" in k]


def test_without_yarn_its_cost_is_zero(tuned):
    assert tuned[1].history[0]["gap/step0_yarn"] == 0.0


def test_skipped_validations_log_the_last_values(worlds, pretrained, tmp_path):
    callback = probe(worlds, every_n_validations=2)
    trainer = fit(tmp_path, worlds, teacher(init=pretrained), callback, steps=6)
    assert [row["step"] for row in callback.history] == [0, 4]
    assert trainer.callback_metrics["gap/prior_kept"] == pytest.approx(callback.history[-1]["gap/prior_kept"])


def test_a_resumed_run_goes_on_from_the_same_start(worlds, pretrained, tmp_path, tuned):
    first = fit(tmp_path / "a", worlds, teacher(init=pretrained), probe(worlds), steps=2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    data = WorldDataModule(
        root=str(worlds[1]), clip=CLIP, content="latents", global_batch=2, workers=0, words=6,
        batches_per_epoch=2, evaluation_scenes=0, validation_windows=2,
    )  # fmt: skip

    def resume(*callbacks):
        trainer = Trainer(
            accelerator="cpu", max_steps=4, callbacks=list(callbacks), use_distributed_sampler=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, logger=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(teacher(init=pretrained), data, ckpt_path=tmp_path / "half.ckpt")

    rest = probe(worlds)
    resume(rest)
    assert rest.history == tuned[1].history
    fit(tmp_path / "b", worlds, teacher(init=pretrained), steps=2).save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(RuntimeError, match=r"goes on at step 2 .*begin anew"):
        resume(probe(worlds))


def test_a_checkpoint_can_be_chosen_by_what_is_kept(worlds, pretrained, tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="gap/prior_kept", mode="max")
    callback = probe(worlds)
    fit(tmp_path, worlds, teacher(init=pretrained), callback, best, enable_checkpointing=True)
    kept = max(row["gap/prior_kept"] for row in callback.history[1:])
    assert float(best.best_model_score) == pytest.approx(kept)


def test_wrong_settings_are_named(worlds, tmp_path):
    with pytest.raises(ValueError, match="num_clips=5 must be even"):
        probe(worlds, num_clips=5)
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        probe(worlds, batch=0)
    with pytest.raises(ValueError, match="validation_scenes=0 of x must be at least 1"):
        HeldOut(root="x", validation_scenes=0)
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=probe(worlds), default_root_dir=tmp_path,
        enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match="Foreign lacks some"):
        trainer.fit(Foreign())


DDP_SCRIPT = """
import json
import sys
from pathlib import Path
from lightning import Trainer
from relic.data import WorldDataModule
from relic.parallel.strategy import ShardedStrategy
from tests.callbacks.test_gap_probe import CLIP, probe, teacher

devices, strategy, worlds, out = int(sys.argv[1]), sys.argv[2], sys.argv[3:5], Path(sys.argv[5])
callback = probe(worlds)
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy=ShardedStrategy() if strategy == "sharded" else strategy,
    max_steps=2, logger=False, enable_progress_bar=False, enable_checkpointing=False,
    enable_model_summary=False, callbacks=callback, use_distributed_sampler=False, default_root_dir=out,
    num_sanity_val_steps=0,
)
data = WorldDataModule(
    root=worlds[1], clip=CLIP, content="latents", global_batch=2, workers=0, words=6, batches_per_epoch=2,
    evaluation_scenes=0, validation_windows=2,
)
trainer.fit(teacher(), data)
(out / f"{devices}-{trainer.global_rank}.json").write_text(json.dumps(callback.history))
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_ranks_measure_what_one_does(worlds, tmp_path, strategy):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    script = tmp_path / "ddp.py"
    script.write_text(DDP_SCRIPT)
    for devices in (1, 2):
        chosen = strategy if devices > 1 else "auto"
        command = [sys.executable, str(script), str(devices), chosen, *map(str, worlds), str(tmp_path)]
        subprocess.run(command, check=True, env=env, timeout=240)
    one, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert first == second and len(one) == len(first) == 2
    for alone, shared in zip(one, first, strict=True):
        assert alone == pytest.approx(shared, rel=1e-4, abs=1e-5)


def test_too_few_windows_to_exchange_actions_are_refused(worlds, tmp_path):
    """Windows drawn twice are neighbours in speed, meet their own actions, and the gain would look like 0."""
    samples = []
    for i in range(4):
        sample = latents_sample(CLIP.max_frames, seed=i, scene=f"room{i}", size=CLIP.height)
        actions = load_array(sample[ACTIONS], key="actions") * np.float32(1 + i)
        samples.append((f"s{i}", sample | {ACTIONS: dump_array(actions)}))
    few = write_dataset(tmp_path / "few", samples)
    with pytest.raises(ValueError, match=r"would get their own actions back.*lower num_clips"):
        fit(tmp_path, worlds, teacher(), probe((worlds[0], few), num_clips=8))
