import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from relic.cli import main
from relic.modules import TeacherExtension
from relic.nn.checkpoints import WeightsSource, load_weights, read_header, save_weights, write_weights
from relic.nn.control import ControlConfig
from relic.nn.denoiser import Denoiser
from relic.nn.dit import DiTConfig
from relic.nn.eight_bits import InEightBits
from relic.nn.tensor_files import TensorsInMemory
from relic.nn.text import WordTableConfig
from relic.types import ClipSpec
from relic.verbs.convert import teacher_config

TINY = DiTConfig(width=256, depth=2, heads=2, ffn=64, text_width=8, freq_width=16, control=None)
STEM = "diffusion_pytorch_model"


def teacher(path: Path, config: DiTConfig = TINY, *, words: WordTableConfig | None = None) -> Denoiser:
    net = Denoiser(config, words)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=generator)
    save_weights(path, net.state_dict(), kind="teacher", config=teacher_config(config))
    return net


def convert(src: Path, out: Path, to: str, *options: str) -> Path:
    main(["convert", str(src), "--out", str(out), "--to", to, *options])
    return out


def test_a_round_trip_through_every_layout_gives_the_same_bytes(tmp_path, capsys):
    first = tmp_path / "0.safetensors"
    teacher(first)
    original = convert(first, tmp_path / "original", "original")
    second = convert(original, tmp_path / "1.safetensors", "relic")
    diffusers = convert(second, tmp_path / "diffusers", "diffusers", "--shard_gb", "0.0005")
    third = convert(diffusers, tmp_path / "2.safetensors", "relic")
    assert len(list(diffusers.glob("*.safetensors"))) > 10
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    again = convert(diffusers, tmp_path / "again", "original")
    for name in ("config.json", f"{STEM}.safetensors"):
        assert (again / name).read_bytes() == (original / name).read_bytes()
    out = capsys.readouterr().out
    assert "a Wan DiT of no public size: width 256, depth 2, heads 2, ffn 64, control no" in out
    assert "tensors  69, 1,691,584 parameters, float32" in out
    assert "diffusers layout, 19 safetensors shards" in out and "wrote" in out


def test_matrices_in_8_bits_are_converted_as_the_floats_they_stand_for(tmp_path, capsys):
    net, source = teacher(tmp_path / "whole.safetensors"), tmp_path / "small.safetensors"
    tensors = InEightBits(TensorsInMemory(net.state_dict()))
    write_weights(source, tensors, kind="teacher", config=teacher_config(TINY))
    half = convert(source, tmp_path / "half.safetensors", "relic", "--dtype", "bfloat16")
    assert "1,691,584 parameters" in capsys.readouterr().out
    other = Denoiser(TINY)
    load_weights(other, WeightsSource(path=str(source)), kind="teacher")
    stored = load_file(half)
    assert stored.keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        assert torch.equal(stored[name], value.bfloat16())
    public = load_file(convert(source, tmp_path / "wan", "original") / f"{STEM}.safetensors")
    assert not [name for name in public if name.endswith(".unit")]


def test_the_config_of_the_original_layout_has_the_public_fields(tmp_path):
    teacher(tmp_path / "w.safetensors", dataclasses.replace(TINY, text_width=4096))
    folder = convert(tmp_path / "w.safetensors", tmp_path / "wan", "original")
    assert json.loads((folder / "config.json").read_text()) == {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 256, "eps": 1e-6, "ffn_dim": 64,
        "freq_dim": 16, "in_dim": 16, "model_type": "t2v", "num_heads": 2, "num_layers": 2, "out_dim": 16,
        "text_len": 512,
    }  # fmt: skip


def test_a_member_is_converted_to_a_teacher_that_a_stage_starts_from(tmp_path, capsys):
    net = teacher(tmp_path / "w.safetensors")
    state = {f"model.{k}": v for k, v in net.dit.state_dict().items()}
    torch.save({"generator": {}, "critic": state, "generator_ema": state}, tmp_path / "sf.pt")
    path = convert(tmp_path / "sf.pt", tmp_path / "ema.safetensors", "relic", "--member", "generator_ema")
    assert "original layout, generator_ema of a torch file" in capsys.readouterr().out
    assert read_header(path)["config"]["dit"] == dataclasses.asdict(TINY)
    rebuilt = TeacherExtension.from_file(str(path))
    assert rebuilt.clip == ClipSpec() and rebuilt.sampler.guidance == 5.0
    module = TeacherExtension(
        net=dataclasses.replace(TINY, control=ControlConfig(width=8)), clip=ClipSpec(),
        init=WeightsSource(path=str(path), missing=("control",)), ema_decay=0.9,
    )  # fmt: skip
    module.configure_model()
    for name, value in net.state_dict().items():
        assert torch.equal(rebuilt.trained.state_dict()[name], value)
        assert torch.equal(module.trained.state_dict()[name], value)
        assert torch.equal(module.ema.state_dict()[name], value)


def test_dtypes_are_kept_unless_another_is_asked_for(tmp_path, capsys):
    net = teacher(tmp_path / "w.safetensors")
    half = convert(tmp_path / "w.safetensors", tmp_path / "half", "original", "--dtype", "bfloat16")
    kept = convert(half, tmp_path / "kept", "diffusers")
    for folder in (half, kept):
        assert {t.dtype for t in load_file(folder / f"{STEM}.safetensors").values()} == {torch.bfloat16}
    back = convert(kept, tmp_path / "back.safetensors", "relic", "--dtype", "float32")
    assert all(torch.equal(load_file(back)[k], v.bfloat16().float()) for k, v in net.state_dict().items())
    assert "parameters, bfloat16" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        convert(half, tmp_path / "other", "original", "--dtype", "float9")
    assert "float9" in capsys.readouterr().err


def test_a_teacher_with_control_keeps_its_own_layout(tmp_path):
    path = tmp_path / "w.safetensors"
    net = teacher(path, dataclasses.replace(TINY, control=ControlConfig(width=8)))
    half = convert(path, tmp_path / "half.safetensors", "relic", "--dtype", "bfloat16")
    assert read_header(half) == read_header(path)
    again = Denoiser(net.dit.config)
    load_weights(again, WeightsSource(path=str(half)), kind="teacher")
    own = again.state_dict()
    assert all(torch.equal(own[k], v.bfloat16().float()) for k, v in net.state_dict().items())


@pytest.mark.parametrize("to", ["original", "diffusers"])
def test_what_a_public_layout_cannot_hold_is_refused(tmp_path, to):
    path = tmp_path / "w.safetensors"
    teacher(path, dataclasses.replace(TINY, control=ControlConfig(width=8)))
    with pytest.raises(SystemExit, match=f"relic convert: The network has camera control, which the {to}"):
        convert(path, tmp_path / "out", to)
    teacher(path, words=WordTableConfig(width=8))
    with pytest.raises(SystemExit, match=r"holds words.weight beside the DiT"):
        convert(path, tmp_path / "out", to)
    save_weights(path, {"x": torch.zeros(1)}, kind="tiny_vae", config={})
    with pytest.raises(SystemExit, match="holds a tiny_vae, which has no DiT"):
        convert(path, tmp_path / "out", to)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_nothing_is_overwritten_and_wrong_options_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    teacher(path)
    folder = convert(path, tmp_path / "wan", "original")
    with pytest.raises(SystemExit, match="wan exists; give another --out"):
        convert(path, folder, "diffusers")
    with pytest.raises(SystemExit, match=r"w.safetensors exists"):
        convert(folder, path, "relic")
    with pytest.raises(SystemExit, match=r"must end in .safetensors"):
        convert(folder, tmp_path / "folder", "relic")
    with pytest.raises(SystemExit, match=r"must be a folder: diffusers weights have a config.json"):
        convert(path, tmp_path / "x.safetensors", "diffusers")
    with pytest.raises(SystemExit, match=r"shard_gb=1.0 is for folders"):
        convert(folder, tmp_path / "x.safetensors", "relic", "--shard_gb", "1")
    with pytest.raises(SystemExit, match=r"shard_gb=-1.0 must be above 0"):
        convert(path, tmp_path / "x", "original", "--shard_gb", "-1")


def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path):
    teacher(tmp_path / "w.safetensors")
    folder = convert(tmp_path / "w.safetensors", tmp_path / "wan", "original")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(SystemExit, match=r"says depth=3, the tensors have 2. Copy both from one place"):
        convert(folder, tmp_path / "x.safetensors", "relic")
    (folder / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"config.json is not JSON"):
        convert(folder, tmp_path / "x.safetensors", "relic")
    net = Denoiser(dataclasses.replace(TINY, width=36))
    torch.save(net.dit.state_dict(), tmp_path / "net.pth")
    with pytest.raises(SystemExit, match=r"no config.json and width 36, which is no multiple of 128"):
        convert(tmp_path / "net.pth", tmp_path / "x.safetensors", "relic")


def test_an_incomplete_network_is_not_converted(tmp_path):
    state = teacher(tmp_path / "w.safetensors").dit.state_dict()
    del state["blocks.1.ffn.2.bias"]
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(SystemExit, match=r"1 missing: blocks.1.ffn.2.bias"):
        convert(tmp_path / "net.pth", tmp_path / "x.safetensors", "relic")
