"""What is killed at random moments and started again equals what was left alone, bit for bit."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relic.modules import TeacherExtension
from relic.nn.control import ControlConfig
from relic.nn.dit import DiTConfig
from relic.nn.text import WordTableConfig
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig
from relic.types import ClipSpec
from tests.data.recordings import latents_sample, write_dataset

NET = """
    net: {width: 32, depth: 2, heads: 2, ffn: 64, latent_channels: 4, text_width: 8, text_length: 32,
          control: {width: 8}}
    words: {width: 8}
"""
DATA = """
data:
  content: latents
  clip: {height: 64, width: 64, horizons: [33]}
  global_batch: 4
  batches_per_epoch: 90
  workers: 0
  validation_scenes: 1
  evaluation_scenes: 1
trainer: {max_steps: 200, accelerator: cpu, log_every_n_steps: 1}
checkpoint: {every_n_train_steps: 7}
"""
STUDENT = "    policy: {class_path: relic.ops.retention.Window, init_args: {latents: 4}}\n"  # grids are 4x4


class Stage(NamedTuple):
    """What is fitted, what it logs and writes, and the states of its trajectories."""

    settings: str
    loss: str
    product: str
    states: int = 0


STAGES = {
    "TeacherExtension": Stage("", "train/loss_flow", "teacher.safetensors"),
    "CausalInit": Stage(
        STUDENT + "    sampler: {shift: 1.0}\n", "train/loss_ode", "student.safetensors", states=5
    ),
    "SelfForcing": Stage(
        STUDENT + "    critic_only_steps: 20\n    critic_ratio: 2\n    teacher: {path: TEACHER}\n",
        "train/loss_critic",
        "student.safetensors",
    ),
}
KILLS = 3


def losses(root: Path, *, loss: str) -> dict[int, float]:
    """Training losses by step, a resumed run's over those of the run it replaces."""
    found: dict[int, float] = {}
    for folder in sorted((root / "lightning_logs").iterdir(), key=lambda p: int(p.name.split("_")[1])):
        events = EventAccumulator(str(folder))
        events.Reload()
        if loss in events.Tags()["scalars"]:
            found.update({event.step: event.value for event in events.Scalars(loss)})
    return found


def write_teacher(root: Path) -> Path:
    """Write a teacher of random weights, as NET has it."""
    clip = ClipSpec(height=64, width=64, horizons=(33,))
    net = DiTConfig(
        width=32, depth=2, heads=2, ffn=64, latent_channels=4, text_width=8, text_length=32,
        control=ControlConfig(width=8),
    )  # fmt: skip
    module = TeacherExtension(net=net, clip=clip, words=WordTableConfig(width=8))
    module.export(root / "random.safetensors")
    return root / "random.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [("TeacherExtension", 0), ("TeacherExtension", 2), ("CausalInit", 0), ("SelfForcing", 0)],
)
def test_a_killed_and_resumed_fit_has_the_same_losses_and_weights(tmp_path, name, workers):
    stage = STAGES[name]
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10_000)))
    print(f"KILL_SEED={seed}")
    moments = random.Random(seed)
    samples = [
        (f"s{i:03d}", latents_sample(33, seed=i, scene=f"room{i % 4}", size=64, states=stage.states))
        for i in range(24)
    ]
    write_dataset(tmp_path / "latents", samples)
    settings = stage.settings.replace("TEACHER", str(write_teacher(tmp_path)))
    model = f"model:\n  class_path: relic.modules.{name}\n  init_args:{NET}{settings}"
    data = DATA.replace("latents", "trajectory") if stage.states else DATA
    (tmp_path / "fit.yaml").write_text(model + data)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(name: str, workers: int) -> list[str]:
        root = tmp_path / name
        words = [sys.executable, "-m", "relic.cli", "fit", "--config", str(tmp_path / "fit.yaml")]
        words += [f"--data.root={tmp_path / 'latents'}", f"--trainer.default_root_dir={root}"]
        words += [f"--data.workers={workers}"]
        resume = (root / "checkpoints" / "last.ckpt").exists()
        return [*words, "--ckpt_path", "last"] if resume else words

    landed = 0
    subprocess.run(command("straight", 0), check=True, env=env, capture_output=True)
    for _ in range(KILLS):
        with subprocess.Popen(
            command("killed", workers), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:  # fmt: skip
            log = tmp_path / "killed" / "lightning_logs"
            begun = len(list(log.glob("*"))) if log.exists() else 0
            while process.poll() is None and (not log.exists() or len(list(log.glob("*"))) == begun):
                time.sleep(0.05)  # starting up; kill it only once it works
            time.sleep(moments.uniform(0.5, 3.0))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                landed += process.wait() == -signal.SIGKILL
    assert landed, "every run ended before it was killed"
    subprocess.run(command("killed", workers), check=True, env=env, capture_output=True)
    straight, killed = (losses(tmp_path / run, loss=stage.loss) for run in ("straight", "killed"))
    assert len(straight) >= 120 and killed == {step: straight[step] for step in killed}
    assert (
        len(straight) - len(killed) <= KILLS
    )  # the line being written goes with the process, its step doesn't
    weights = [(tmp_path / run / stage.product).read_bytes() for run in ("straight", "killed")]
    assert weights[0] == weights[1]


def shards(root: Path) -> dict[str, str]:
    """Hashes of all that a command leaves in `shards/`, half-written files included."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((root / "shards").iterdir())}


def run_with_kills(words: list[str], out: Path, moments: random.Random, *, seconds: float) -> None:
    """Run a command that would take `seconds`, kill it three times on the way, and let it finish."""
    landed = 0
    command = [sys.executable, "-m", "relic.cli", *words, "--out", str(out)]
    for _ in range(KILLS):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.2, 0.7) * seconds)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        landed += process.wait() == -signal.SIGKILL
        done = len(list((out / "shards").glob("*.tar"))) if out.exists() else 0
        print(f"killed with {done} shards whole")
    assert landed, "every run ended before it was killed"
    subprocess.run(command, check=True)


@pytest.mark.slow
def test_rendering_and_encoding_killed_at_random_moments_leave_the_same_shards(tmp_path):
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10_000)))
    print(f"KILL_SEED={seed}")
    moments = random.Random(seed)
    render = ["render", "--scenes", "6", "--minutes", "2.4", "--size", "64", "96", "--backend", "software"]
    TinyVAE(TinyVAEConfig.tiny()).save(tmp_path / "vae.safetensors")
    encode = [
        "encode",
        str(tmp_path / "render"),
        "--vae",
        str(tmp_path / "vae.safetensors"),
        "--horizon",
        "33",
    ]
    for words in ([*render, "--workers", "2"], [*encode, "--device", "cpu"]):
        whole, killed = tmp_path / words[0], tmp_path / f"{words[0]}-killed"
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "relic.cli", *words, "--out", str(whole)], check=True)
        run_with_kills(words, killed, moments, seconds=time.monotonic() - start)
        assert shards(killed) == shards(whole)
        assert (killed / "index.parquet").read_bytes() == (whole / "index.parquet").read_bytes()
