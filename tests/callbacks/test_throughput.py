import time

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from relic.callbacks import Throughput
from relic.callbacks.throughput import sizes_of
from relic.types import Mixed
from tests.worlds import batch


class Slow(LightningModule):
    """Takes 10 ms for a batch; its data takes 30."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.01)
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        class Waiting(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                time.sleep(0.03)
                return batch([0, 1])

        return DataLoader(Waiting(), batch_size=None)


def test_speeds_and_the_share_of_waiting_are_those_of_the_run(tmp_path):
    speed = Throughput(every_n_batches=4, flops_per_sample=2e9, peak_flops=1e12)
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=speed, max_epochs=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Slow())
    speeds = {name: float(value) for name, value in trainer.callback_metrics.items()}
    given = batch([0, 1])
    assert 0.5 < speeds["speed/waiting"] < 0.95  # 30 of 40 ms, and what Lightning takes
    assert speeds["speed/samples_per_s"] == pytest.approx(2 * speeds["speed/batches_per_s"])
    assert speeds["speed/samples_per_s"] < 2 / 0.04
    frames = given.actions.shape[1]
    assert speeds["speed/frames_per_s"] == pytest.approx(frames * speeds["speed/samples_per_s"])
    assert speeds["speed/mfu"] == pytest.approx(speeds["speed/samples_per_s"] * 2e-3)
    t, _, h, w = given.latents.shape[1:]
    tokens = t * h * w // 4
    assert speeds["speed/tokens_per_s"] == pytest.approx(tokens * speeds["speed/samples_per_s"])


def test_validations_in_between_neither_count_as_time_nor_begin_anew(tmp_path):
    class Validated(Slow):
        def validation_step(self, batch, batch_idx):
            time.sleep(0.5)

        def val_dataloader(self):
            return DataLoader([0], batch_size=None)

    speed = Throughput(every_n_batches=5)
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=speed, max_epochs=1, val_check_interval=3,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Validated())
    assert trainer.callback_metrics["speed/batches_per_s"] > 8  # 40 ms each; with the validation about 7


def test_parts_of_a_mixed_batch_add_up_and_foreign_batches_have_samples_only():
    one, three = batch([0]), batch([0, 1, 2])
    sums = [a + b for a, b in zip(sizes_of(one), sizes_of(three), strict=True)]
    assert list(sizes_of(Mixed(one, three))) == sums
    assert sizes_of({"x": torch.zeros(5, 2), "y": "text"}) == (5, 0, 0)
    assert sizes_of(torch.zeros(7)) == (7, 0, 0) and sizes_of("text") == (0, 0, 0)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="every_n_batches=0"):
        Throughput(every_n_batches=0)
    with pytest.raises(ValueError, match="peak_flops=-1"):
        Throughput(peak_flops=-1)
