"""Sharded over two processes, a stage computes what one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from relic.nn.checkpoints import save_weights
from tests.modules.test_teacher import teacher

SCRIPT = """
import sys
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from relic.nn.checkpoints import WeightsSource
from relic.parallel import Compute
from relic.parallel.strategy import ShardedStrategy
from tests.modules.test_teacher import teacher
from tests.worlds import LatentWorld

devices, steps, resume, init, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]

class Losses(Callback):
    values = []
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))

torch.manual_seed(0)
module = teacher(
    optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), compute=Compute(keep="products"), ema_decay=0.9,
    init=WeightsSource(path=init, missing=("control",)) if init else None,
)
keeper = ModelCheckpoint(dirpath=out + "/kept", every_n_train_steps=2, save_top_k=-1, filename="{step}")
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy=ShardedStrategy() if devices > 1 else "auto",
    max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[Losses(), keeper],
    use_distributed_sampler=False, default_root_dir=out, gradient_clip_val=0.05, accumulate_grad_batches=2,
    limit_val_batches=1,
)
trainer.fit(module, LatentWorld(batches=4), ckpt_path=resume or None)
if trainer.is_global_zero:
    torch.save(Losses.values, out + "/losses.pt")
"""


def fit(
    folder: Path, *, devices: int, steps: int, resume: str = "", init: str = ""
) -> tuple[list[float], dict[str, torch.Tensor]]:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "fit.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(devices), str(steps), resume, init, str(folder)]
    subprocess.run(command, check=True, env=env, timeout=240)
    return torch.load(folder / "losses.pt"), load_file(folder / "teacher.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.slow
def test_two_sharded_processes_equal_one_with_clipping_accumulation_and_a_resume(tmp_path):
    losses, weights = fit(tmp_path / "one", devices=1, steps=4)
    sharded, sharded_weights = fit(tmp_path / "two", devices=2, steps=4)
    assert len(losses) == 8 and losses == pytest.approx(sharded, abs=1e-5)
    assert apart(weights, sharded_weights) <= 1e-5
    kept = tmp_path / "two" / "kept" / "step=2.ckpt"
    assert kept.is_dir()
    rest, resumed_weights = fit(tmp_path / "again", devices=2, steps=4, resume=str(kept))
    assert rest == sharded[-len(rest) :]
    assert apart(resumed_weights, sharded_weights) == 0


@pytest.mark.slow
def test_a_sharded_stage_starts_from_a_file_and_draws_what_it_lacks_as_one_process_does(tmp_path):
    whole = teacher()
    whole.configure_model()
    plain = {key: value for key, value in whole.net.state_dict().items() if ".control." not in key}
    config = {**whole.export_config()}
    save_weights(tmp_path / "plain.safetensors", plain, kind="teacher", config=config)
    init = str(tmp_path / "plain.safetensors")
    losses, weights = fit(tmp_path / "one", devices=1, steps=2, init=init)
    sharded, sharded_weights = fit(tmp_path / "two", devices=2, steps=2, init=init)
    assert losses == pytest.approx(sharded, abs=1e-5)
    assert apart(weights, sharded_weights) <= 1e-5
