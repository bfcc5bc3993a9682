"""A run that is stopped inside an epoch and resumed reads the batches an uninterrupted one would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from relic.data import WorldDataModule
from relic.types import Batch, ClipSpec

SMALL = ClipSpec(height=64, width=64, horizons=(17, 33))


class Recorder(LightningModule):
    """Remembers the keys of its batches; `fail_at` raises while a batch is being worked on."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys: list[list[int]] = []
        self.fail_at = fail_at

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if len(self.keys) == self.fail_at:
            raise KeyError("stop here")
        self.keys.append(batch.key.tolist())
        return self.weight * batch.actions.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/actions", batch.actions.mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def data_module(root: Path, *, workers: int) -> WorldDataModule:
    return WorldDataModule(
        root=str(root), clip=SMALL, global_batch=2, batches_per_epoch=4, workers=workers, palindromes=0.5,
        validation_scenes=1, evaluation_scenes=1, validation_windows=2,
    )  # fmt: skip


def trainer(folder: Path, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "use_distributed_sampler": False, "default_root_dir": folder,
        "enable_checkpointing": False, "max_epochs": 3,
    }  # fmt: skip
    return Trainer(**(defaults | settings))


def fit(root: Path, folder: Path, *, workers: int, resume: Path | None = None, **settings: Any) -> Recorder:
    module = Recorder()
    run = trainer(folder, **settings)
    run.fit(module, datamodule=data_module(root, workers=workers), ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def uninterrupted(walks: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    return fit(walks, tmp_path_factory.mktemp("whole"), workers=0).keys


def test_an_uninterrupted_run_reads_every_batch_once(uninterrupted: list[list[int]]) -> None:
    keys = [key for batch in uninterrupted for key in batch]
    assert len(uninterrupted) == 12
    assert len(set(keys)) == 24


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resuming_goes_on_exactly(
    walks: Path, tmp_path: Path, uninterrupted: list[list[int]], stop: int
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=stop, save_top_k=-1)
    first = fit(
        walks,
        tmp_path,
        workers=0,
        max_steps=stop,
        max_epochs=-1,
        callbacks=[saver],
        enable_checkpointing=True,
    )
    rest = fit(walks, tmp_path, workers=0, resume=tmp_path / "middle.ckpt")
    assert first.keys == uninterrupted[:stop]
    assert first.keys + rest.keys == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 6])
def test_resuming_goes_on_exactly_with_other_workers(
    walks: Path, tmp_path: Path, uninterrupted: list[list[int]], stop: int
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=stop, save_top_k=-1)
    first = fit(
        walks,
        tmp_path,
        workers=2,
        max_steps=stop,
        max_epochs=-1,
        callbacks=[saver],
        enable_checkpointing=True,
    )
    rest = fit(walks, tmp_path, workers=2, resume=tmp_path / "middle.ckpt")
    assert first.keys + rest.keys == uninterrupted


def test_a_batch_that_failed_is_read_again(
    walks: Path, tmp_path: Path, uninterrupted: list[list[int]]
) -> None:
    run, module, data = trainer(tmp_path), Recorder(fail_at=6), data_module(walks, workers=0)
    with pytest.raises(KeyError):
        run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "failed.ckpt")
    rest = fit(walks, tmp_path, workers=0, resume=tmp_path / "failed.ckpt")
    assert module.keys + rest.keys == uninterrupted


def test_shorter_epochs_of_the_trainer_skip_no_batch(
    walks: Path, tmp_path: Path, uninterrupted: list[list[int]]
) -> None:
    assert fit(walks, tmp_path, workers=0, limit_train_batches=3, max_epochs=2).keys == uninterrupted[:6]


def test_the_distributed_sampler_of_the_trainer_is_refused(walks: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Trainer\(use_distributed_sampler=False\)"):
        fit(walks, tmp_path, workers=0, use_distributed_sampler=True)
