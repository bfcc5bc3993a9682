"""Clips are scored over two sharded processes as by one, and no rank waits for ever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles import vae_of

SCRIPT = """
import json, sys
import torch
from lightning import Trainer
from relic.callbacks import ActionFollowing, MemoryRetrieval
from relic.nn.denoiser import EulerSampler
from relic.ops.actions import integrate
from relic.parallel.strategy import ShardedStrategy
from relic.types import Clip
from tests.callbacks.foreign import Known
from tests.modules.test_teacher import teacher
from tests.worlds import LatentWorld

devices, vae, out = int(sys.argv[1]), *sys.argv[2:]
actions = torch.zeros(17, 13)
actions[1:9, 9], actions[9:, 8] = 8.0, 8.0  # turns away and back, in degrees a frame
c2w = integrate(actions, d_bar=0.1)
draw = torch.Generator().manual_seed(0)
clips = [
    Clip(
        torch.randint(0, 256, (17, 32, 48, 3), dtype=torch.uint8, generator=draw), c2w,
        torch.tensor([37.0, 37.0, 23.5, 15.5], dtype=torch.float64), 4.0, 0.1,
    )
    for _ in range(3)
]
known = Known(clips)
callbacks = [MemoryRetrieval(clips, estimator=known), ActionFollowing(clips, estimator=known)]
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy=ShardedStrategy() if devices > 1 else "auto", max_epochs=1,
    logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    callbacks=callbacks, use_distributed_sampler=False, num_sanity_val_steps=0, default_root_dir=out,
)
module = teacher(vae=vae, sampler=EulerSampler(steps=2, shift=1.0), ema_decay=0.5)
trainer.fit(module, LatentWorld(batches=2))
if trainer.is_global_zero:
    with open(f"{out}/scores.json", "w") as file:
        json.dump({name: float(value) for name, value in trainer.callback_metrics.items()}, file)
"""


@pytest.mark.slow
def test_two_sharded_processes_score_three_clips_as_one_does(tmp_path):
    vae_of().save(tmp_path / "vae.safetensors")
    (tmp_path / "fit.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    found = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        out.mkdir()
        command = [
            sys.executable,
            str(tmp_path / "fit.py"),
            str(devices),
            str(tmp_path / "vae.safetensors"),
            str(out),
        ]
        subprocess.run(command, check=True, env=env, timeout=240)
        found.append(json.loads((out / "scores.json").read_text()))
    one, two = found
    assert one["memory/clips_self"] == 3 and one["memory/pairs_self"] > 0 and one["action/coverage"] == 1
    assert one["memory/psnr_self_autoencoder"] > 0
    scores = {name for name in one if name.startswith(("memory/", "action/"))}
    assert scores == {name for name in two if name.startswith(("memory/", "action/"))}
    for name in scores:
        assert two[name] == pytest.approx(one[name], abs=0.05, nan_ok=True), name
