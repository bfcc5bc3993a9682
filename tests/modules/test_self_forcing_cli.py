"""The shipped recipe of self-forcing, run from the command line at nano size."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relic.cli import main
from relic.nn.checkpoints import read_header
from relic.nn.student import StudentConfig
from relic.ops.retention import Compressed
from relic.types import ClipSpec
from tests.data.recordings import latents_sample, write_dataset
from tests.modules.distillation import STUDENT, write_files

NET = dataclasses.replace(STUDENT.net, text_length=32)
# the horizon is one of 33 frames here, and the student's factor another than the teacher's
NANO = dataclasses.replace(
    STUDENT, net=NET, clip=ClipSpec(height=64, width=64, horizons=(33,)), policy=Compressed(window=4)
)
SIZES = {
    "net": "{width: 32, depth: 2, heads: 2, ffn: 64, latent_channels: 4, text_width: 8, text_length: 32, "
    "control: {width: 8, rays: 0.0}, rope_factor: 2.0}",
    "words": "{width: 8}", "policy": "{window: 4}", "sampler": "{steps: 2, shift: 5.0}",
    "critic_only_steps": "1", "critic_ratio": "2",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    samples = [(f"s{i:03d}", latents_sample(33, seed=i, scene=f"room{i % 4}", size=64)) for i in range(8)]
    write_dataset(folder / "latents", samples)
    write_files(folder, config=NANO, prefix_share=0.5)
    stretched = dataclasses.replace(NANO, net=dataclasses.replace(NET, rope_factor=2.0))
    write_files(folder / "stretched", config=stretched)
    return folder


def fit(world: Path, root: Path, *words: str, steps: int) -> None:
    model = {
        **SIZES,
        "init": f"{{path: {world / 'stretched' / 'student.safetensors'}}}",
        "teacher": f"{{path: {world / 'teacher.safetensors'}}}",
    }
    configs = ("self_forcing/tiny.yaml", "self_forcing/horizon/5s.yaml", "trainer/cpu.yaml")
    data = {
        "root": world / "latents", "clip": "{height: 64, width: 64, horizons: [33]}", "global_batch": 2,
        "batches_per_epoch": 3, "workers": 0, "validation_scenes": 1, "evaluation_scenes": 1,
    }  # fmt: skip
    run = {
        "default_root_dir": root, "max_steps": steps, "log_every_n_steps": 1, "enable_progress_bar": "false",
    }  # fmt: skip
    main(
        [
            "fit",
            *(word for name in configs for word in ("--config", f"configs/{name}")),
            *(f"--model.init_args.{name}={value}" for name, value in model.items()),
            *(f"--data.{name}={value}" for name, value in data.items()),
            *(f"--trainer.{name}={value}" for name, value in run.items()),
            "--checkpoint.every_n_train_steps=2",
            *words,
        ]
    )


def test_the_recipe_runs_logs_and_writes_a_student_and_resumes_to_the_same_bytes(world, tmp_path):
    fit(world, tmp_path / "straight", steps=7)
    fit(world, tmp_path / "stopped", steps=4)
    fit(world, tmp_path / "stopped", "--ckpt_path", "last", steps=7)
    written = [(tmp_path / name / "student.safetensors") for name in ("straight", "stopped")]
    assert written[0].read_bytes() == written[1].read_bytes()
    header = StudentConfig.from_header(read_header(written[0], kind="student")["config"])
    assert header.net.rope_factor == 2.0 and header.policy == Compressed(window=4)
    start = load_file(world / "stretched" / "student.safetensors")
    assert any(not torch.equal(start[name], value) for name, value in load_file(written[0]).items())
    events = EventAccumulator(str(next((tmp_path / "straight" / "lightning_logs").iterdir())))
    events.Reload()
    names = {
        "train/loss_critic", "train/loss_student", "train/loss_ratio", "train/error_ratio",
        "train/grad_norm_student", "train/grad_norm_critic", "train/colour_drift", "step/student",
        "step/critic", "val/error_latents", "val/colour_drift",
    }  # fmt: skip
    assert names <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("step/student")][-1] == 2.0


def test_a_teacher_of_another_factor_stops_the_run_before_it_starts(world, tmp_path):
    with pytest.raises(SystemExit, match=r"rope_factor is 1\.0 there, 3\.0 here.*teacher_rope_factor"):
        fit(world, tmp_path, "--model.init_args.teacher_rope_factor=3.0", steps=1)


def test_an_exit_step_that_is_not_one_stops_the_run_before_it_starts(world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(world, tmp_path, "--model.init_args.exit_step=4", steps=1)
    assert "exit_step=4 must be one of the 2 steps" in capsys.readouterr().err
