"""Self-forcing over two processes, replicated and sharded, computes what one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.modules.distillation import network, write_files
from tests.parallel.test_shard import apart

SCRIPT = """
import sys
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from relic.nn.checkpoints import WeightsSource
from relic.parallel import Compute
from relic.parallel.strategy import ShardedStrategy
from tests.modules.distillation import Rollouts, self_forcing

strategy, replay_by, resume, files, out = sys.argv[1:6]
start, steps = map(int, sys.argv[6:])

class Values(Callback):
    values = []
    def on_train_start(self, trainer, module):
        original = module.log_dict
        def spy(values, **settings):
            self.values += [
                (name, float(trainer.strategy.reduce(torch.as_tensor(float(v)), reduce_op="mean")))
                for name, v in values.items()
                if name in ("train/loss_critic", "train/loss_student") or name.startswith("train/grad_norm")
            ]
            original(values, **settings)
        module.log_dict = spy

torch.manual_seed(0)
sources = {"teacher": "teacher.safetensors", "init": "student.safetensors"}
module = self_forcing(
    {role: WeightsSource(path=f"{files}/{name}") for role, name in sources.items()},
    compute=Compute(keep="inputs"), score_compute=Compute(keep="products"), accumulate=2, clip_norm=0.004,
    replay_by=replay_by,
)
# the first checkpoint is written before the student's first step, the second before its second
keeper = ModelCheckpoint(dirpath=out + "/kept", every_n_train_steps=2, save_top_k=-1, filename="{step}")
trainer = Trainer(
    accelerator="cpu", devices=1 if strategy == "auto" else 2,
    strategy=ShardedStrategy() if strategy == "sharded" else strategy,
    max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[Values(), keeper], use_distributed_sampler=False, default_root_dir=out,
)
trainer.fit(module, Rollouts(batches=14, start=start), ckpt_path=resume or None, weights_only=False)
module.export(module.export_path)
held = {k: tuple(getattr(v, "to_local", lambda: v)().shape) for k, v in module.real.net.named_parameters()}
if trainer.is_global_zero:
    torch.save((Values.values, held), out + "/values.pt")
"""


def fit(
    folder: Path, files: Path, strategy: str, *, replay_by: str = "block", start: int = 0, resume: str = ""
) -> tuple:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "fit.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [strategy, replay_by, resume, files, folder, start, 7]
    command = [sys.executable, script, *map(str, words)]
    subprocess.run(command, check=True, env=env, timeout=240)
    values, held = torch.load(folder / "values.pt")
    return values, load_file(folder / "student.safetensors"), held


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    write_files(folder / "files")
    return folder / "files", *fit(folder, folder / "files", "auto")[:2]


def equal(values: list[tuple[str, float]], others: list[tuple[str, float]]) -> bool:
    names, numbers = zip(*values, strict=True)
    other_names, other_numbers = zip(*others, strict=True)
    return names == other_names and numbers == pytest.approx(other_numbers, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("replay_by", ["block", "clip"])  # alone it is by block
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_equal_one_with_two_optimisers_clipping_and_accumulation(
    tmp_path, alone, strategy, replay_by
):
    files, values, weights = alone
    others, other_weights, held = fit(tmp_path, files, strategy, replay_by=replay_by)
    assert {name for name, _ in values} == {
        "train/loss_critic", "train/loss_student", "train/grad_norm_critic", "train/grad_norm_student"
    }  # fmt: skip
    assert equal(values, others)
    assert apart(weights, other_weights) <= 1e-5
    start = dict(network(2).named_parameters())
    assert max(float((weights[k] - v.detach()).abs().max()) for k, v in start.items()) > 1e-4  # it did move
    halved = sum(held[k] != tuple(v.shape) for k, v in start.items())
    assert halved > 0.9 * len(held) if strategy == "sharded" else halved == 0


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])
def test_a_sharded_run_resumes_exactly_also_from_before_the_students_first_step(tmp_path, alone, step):
    files, _, _ = alone
    values, weights, _ = fit(tmp_path / "straight", files, "sharded")
    kept = tmp_path / "straight" / "kept" / f"step={step}.ckpt"
    assert kept.is_dir()
    rest, resumed, _ = fit(tmp_path / "again", files, "sharded", start=2 * step, resume=str(kept))
    assert rest == values[-len(rest) :]
    assert apart(weights, resumed) == 0
    # student, its average and the critic, and two moments of two of them: seven networks, and no teacher
    held = FileSystemReader(kept).read_metadata().state_dict_metadata
    networks = {name.split(".")[1] for name in held if name.startswith("state_dict.")}
    assert networks == {"net", "ema", "critic"}
    numbers = sum(entry.size.numel() for entry in held.values() if isinstance(entry, TensorStorageMetadata))
    parameters = sum(v.numel() for v in weights.values())
    assert 7 * parameters <= numbers < 7 * parameters + 500  # steps of the optimisers
