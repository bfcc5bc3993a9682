import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from relic.cli import main
from relic.data.index import Index
from relic.data.schema import ACTIONS, JSON, TRAJECTORY, load_array
from relic.modules import TeacherExtension
from relic.nn.checkpoints import file_sha256, read_header, save_weights
from relic.nn.denoiser import EulerSampler
from relic.nn.student import FewSteps
from relic.ops.actions import controls_of
from relic.ops.words import word_ids
from relic.types import ClipSpec
from tests.data.recordings import latents_sample, write_dataset
from tests.data.test_encode import contents, members
from tests.nn.test_denoiser import euler
from tests.worlds import NANO, NANO_WORDS

CLIP = ClipSpec(height=32, width=32, horizons=(17,), block_latents=2)


def teacher(path: Path, **changes: object) -> Path:
    module = TeacherExtension(
        **{"net": NANO, "clip": CLIP, "words": NANO_WORDS, "ema_decay": None,
           "sampler": EulerSampler(steps=8, shift=3.0, guidance=2.0), **changes}
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    save_weights(path, module.net.state_dict(), kind="teacher", config=module.export_config())
    return path


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    samples = [(f"w{i}", latents_sample(17, seed=i, scene=f"s{i}", size=32)) for i in range(4)]
    return write_dataset(tmp_path_factory.mktemp("latents"), samples)


def run(path: Path, latents: Path, out: Path, *extra: str) -> None:
    words = ["ode-pairs", str(path), "--latents", str(latents), "--out", str(out), "--device", "cpu"]
    main([*words, "--horizon", "17", *extra])


def test_the_verb_writes_the_states_of_the_teacher_at_the_levels_of_the_student(latents, tmp_path, capsys):
    path, out = teacher(tmp_path / "teacher.safetensors"), tmp_path / "pairs"
    run(path, latents, out, "--batch", "2")
    assert "index.parquet" in capsys.readouterr().out
    levels = FewSteps(shift=3.0).levels
    net = TeacherExtension.from_file(str(path)).trained
    for row in Index.open(out).rows:
        assert row.levels == levels
        held = members(out, row)
        description = json.loads(held[JSON])
        assert description["teacher_sha256"] == file_sha256(path)
        assert description["sampler"] == {"steps": 8, "shift": 3.0, "guidance": 2.0}
        states = torch.from_numpy(load_array(held[TRAJECTORY])).float()[None]
        given = {
            "given": states[:, 0, :1], "text": word_ids(description["caption"], length=6)[None],
            "controls": controls_of(torch.from_numpy(load_array(held[ACTIONS]))[None]),
        }  # fmt: skip
        for state, until in zip(states.unbind(1), (*levels, 0.0), strict=True):
            with torch.no_grad():
                plain = euler(net, states[:, 0], **given, steps=8, shift=3.0, guidance=2.0, until=until)
            torch.testing.assert_close(state, plain, atol=2e-2, rtol=1e-2)  # float16, and noise rounded so
    before = contents(out)
    run(path, latents, out)
    assert contents(out) == before


def test_steps_shift_and_guidance_may_differ_from_the_teachers(latents, tmp_path):
    path, out = teacher(tmp_path / "teacher.safetensors"), tmp_path / "pairs"
    extra = ("--steps", "6", "--shift", "1", "--guidance", "1", "--student_steps", "2", "--windows", "4")
    run(path, latents, out, *extra, "--per_shard", "3", "--part", "1", "2")
    assert json.loads((out / "ode_pairs.json").read_text())["levels"] == [1.0, 0.5]
    assert [p.name for p in (out / "shards").iterdir()] == ["017f-00001.tar"]


def test_a_teacher_of_prefixes_goes_on_from_true_latents(latents, tmp_path):
    path = teacher(tmp_path / "t.safetensors", prefix_share=0.5)
    run(path, latents, tmp_path / "out", "--prefix_share", "1")
    for row in Index.open(tmp_path / "out").rows:
        states = load_array(members(tmp_path / "out", row)[TRAJECTORY])
        known = (states[0] == states[-1]).all((1, 2, 3)).sum()
        assert known > 1 and (states[:, :known] == states[-1, :known]).all()
    with pytest.raises(SystemExit, match=r"prefix_share=1.0, but .* continues one image only"):
        run(teacher(tmp_path / "u.safetensors"), latents, tmp_path / "no", "--prefix_share", "1")


def test_what_does_not_fit_is_said_before_time_is_spent(latents, tmp_path):
    path = teacher(tmp_path / "teacher.safetensors")
    with pytest.raises(SystemExit, match=r"relic ode-pairs: 9 steps shifted by 3 .* use 8 or 12 steps"):
        run(path, latents, tmp_path / "pairs", "--steps", "9")
    plain = teacher(tmp_path / "plain.safetensors", net=replace(NANO, control=None))
    with pytest.raises(SystemExit, match="has no control"):
        run(plain, latents, tmp_path / "pairs")
    with pytest.raises(SystemExit, match="fit the stage that writes them first"):
        run(tmp_path / "none.safetensors", latents, tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


CONFIG = {
    "model": {
        "class_path": "relic.modules.CausalInit",
        "init_args": {
            "net": {
                "width": 32, "depth": 2, "heads": 2, "ffn": 64, "latent_channels": 4, "text_width": 8,
                "text_length": 6, "control": {"width": 8},
            },
            "words": {"width": 8}, "sampler": {"shift": 3.0}, "policy": {"window": 2, "schedule": [1, 2]},
        },
    },
    "data": {
        "content": "trajectory", "global_batch": 2, "workers": 0, "validation_scenes": 1, "words": 6,
        "evaluation_scenes": 1, "clip": {"height": 32, "width": 32, "horizons": [17], "block_latents": 2},
    },
    "trainer": {"accelerator": "cpu", "max_steps": 3, "logger": False},
}  # fmt: skip


def test_a_student_is_fitted_to_them_from_the_command_line(latents, tmp_path, monkeypatch):
    path, out = teacher(tmp_path / "teacher.safetensors"), tmp_path / "pairs"
    run(path, latents, out)
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(CONFIG))
    words = ["fit", "--config", str(tmp_path / "fit.yaml"), f"--data.root={out}"]
    words += [f"--model.init_args.init.path={path}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    monkeypatch.setattr("sys.argv", ["relic"])
    main(words)
    header = read_header(tmp_path / "run" / "student.safetensors", kind="student")
    assert header["config"]["policy"] == {
        "kind": "compressed", "window": 2, "schedule": [1, 2], "max_latents": None,
    }  # fmt: skip
    with pytest.raises(SystemExit, match=r"0.9000, 0.7500, 0.5000; the student denoises at 1.0000, 0.9375"):
        main([*words, "--model.init_args.sampler.shift=5"])
