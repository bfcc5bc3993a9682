import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn

from relic.nn.checkpoints import (
    WeightsSource,
    check_source,
    file_sha256,
    load_weights,
    read_header,
    save_weights,
)
from relic.nn.control import ControlConfig
from relic.nn.denoiser import Denoiser
from relic.nn.dit import DiT, DiTConfig
from relic.nn.tensor_files import TensorsInMemory
from relic.nn.wan_layout import write_public
from tests.worlds import NANO, NANO_WORDS

PLAIN = dataclasses.replace(NANO, control=None)
STEM = "diffusion_pytorch_model"


def written(path, net: Denoiser):
    config = {"dit": dataclasses.asdict(net.dit.config), "words": None}
    save_weights(path, net.state_dict(), kind="teacher", config=config)
    return WeightsSource(path=str(path))


def test_weights_and_header_survive_the_round_trip(tmp_path):
    net, other = Denoiser(NANO, NANO_WORDS), Denoiser(NANO, NANO_WORDS)
    source = written(tmp_path / "w.safetensors", net)
    load_weights(other, source, kind="teacher")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert read_header(source.path)["config"]["dit"]["width"] == NANO.width
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_same_weights_have_the_same_hash(tmp_path):
    net = Denoiser(NANO)
    a, b = written(tmp_path / "a.safetensors", net), written(tmp_path / "b.safetensors", net)
    assert file_sha256(a.path) == file_sha256(b.path)


def test_every_difference_is_named(tmp_path):
    source = written(tmp_path / "w.safetensors", Denoiser(NANO, NANO_WORDS))
    with pytest.raises(ValueError, match=r"1 unexpected: words.weight"):
        load_weights(Denoiser(NANO), source, kind="teacher")
    wider = dataclasses.replace(NANO, ffn=128)
    with pytest.raises(ValueError, match=r"ffn.0.weight: \(64, 32\) in the file, \(128, 32\) here"):
        load_weights(Denoiser(wider, NANO_WORDS), source, kind="teacher")
    deeper = dataclasses.replace(NANO, depth=3)
    with pytest.raises(ValueError, match=r"missing: dit\.blocks\.2"):
        load_weights(Denoiser(deeper, NANO_WORDS), source, kind="teacher")


def test_listed_prefixes_may_be_missing(tmp_path):
    source = written(tmp_path / "w.safetensors", Denoiser(NANO))
    net = Denoiser(NANO, NANO_WORDS)
    load_weights(net, dataclasses.replace(source, missing=("words",)), kind="teacher")
    assert not net.words.weight.any()


def test_another_rope_factor_must_be_asked_for(tmp_path):
    source = written(tmp_path / "w.safetensors", Denoiser(NANO))
    stretched = Denoiser(dataclasses.replace(NANO, rope_factor=2.0))
    with pytest.raises(ValueError, match=r"rope_factor=1.0.*has 2.0.*restate"):
        load_weights(stretched, source, kind="teacher")
    load_weights(stretched, dataclasses.replace(source, rope_factor="restate"), kind="teacher")


def test_damaged_foreign_and_wrong_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No weights at"):
        read_header(tmp_path / "none")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / written(tmp_path / "w.safetensors", Denoiser(NANO)).path).read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_header(cut)
    with pytest.raises(ValueError, match="holds a teacher, but a tiny_vae is needed"):
        read_header(tmp_path / "w.safetensors", kind="tiny_vae")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="'no format'"):
        read_header(tmp_path / "foreign.safetensors")


# -- public weights -----------------------------------------------------------------------------------------


def plain(config=PLAIN) -> DiT:
    net = DiT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return net


def public(folder, net: DiT, *, layout="original", **settings):
    write_public(folder, TensorsInMemory(net.state_dict()), config=net.config, layout=layout, **settings)
    return folder


def loaded(path, config=PLAIN, **settings) -> Denoiser:
    with torch.device("meta"):
        net = Denoiser(config)
    load_weights(net, WeightsSource(path=str(path), **settings), kind="teacher", device="cpu")
    return net


def same(net: nn.Module, other: nn.Module) -> bool:
    ours, theirs = net.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_public_folder_loads_whole_or_in_shards(tmp_path, layout, shard_bytes):
    net = plain()
    folder = public(tmp_path / "wan", net, layout=layout, shard_bytes=shard_bytes)
    assert len(list(folder.glob("*.safetensors"))) > (1 if shard_bytes == 20_000 else 0)
    assert same(loaded(folder).dit, net)


def test_every_way_to_point_at_weights_finds_them(tmp_path):
    net = plain()
    sharded = public(tmp_path / "sharded", net, shard_bytes=20_000)
    single = public(tmp_path / "single", net)
    public(tmp_path / "pipeline" / "transformer", net, layout="diffusers")
    shutil.copy(single / f"{STEM}.safetensors", tmp_path / "renamed.safetensors")
    (single / "Wan2.1_VAE.pth").write_bytes(b"beside the network, and left alone")
    for path in (
        sharded / f"{STEM}.safetensors.index.json",
        single,
        single / f"{STEM}.safetensors",
        tmp_path / "pipeline",
        tmp_path / "renamed.safetensors",
    ):
        assert same(loaded(path).dit, net), path


def test_a_bare_network_loads_public_weights_too(tmp_path):
    net, other = plain(), DiT(PLAIN)
    load_weights(other, WeightsSource(path=str(public(tmp_path / "wan", net))), kind="teacher")
    assert same(other, net)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_loads(tmp_path, zipped):
    net = plain()
    path = tmp_path / "net.pth"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert same(loaded(path).dit, net)


def test_a_self_forcing_file_loads_the_member_asked_for(tmp_path):
    nets = {"generator": plain(), "critic": DiT(PLAIN), "generator_ema": DiT(PLAIN)}
    wrap = "model._fsdp_wrapped_module."
    states = {
        name: {
            wrap + k.replace("ffn", "_checkpoint_wrapped_module.ffn"): v for k, v in net.state_dict().items()
        }
        for name, net in nets.items()
    }
    torch.save(states, tmp_path / "model.pt")
    for name, net in nets.items():
        assert same(loaded(tmp_path / "model.pt", member=name).dit, net)
    with pytest.raises(ValueError, match=r"3 networks: generator, critic, generator_ema. Set member"):
        loaded(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"member='ema' is not in .*; it holds generator, critic"):
        loaded(tmp_path / "model.pt", member="ema")
    torch.save({"generator": states["generator"]}, tmp_path / "one.pt")
    assert same(loaded(tmp_path / "one.pt").dit, nets["generator"])
    with pytest.raises(ValueError, match="member='ema' is for torch files of several networks"):
        loaded(public(tmp_path / "wan", plain()), member="ema")


def test_weights_are_cast_to_the_network(tmp_path):
    net = plain()
    folder = public(tmp_path / "wan", net, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(folder / f"{STEM}.safetensors").values()} == {torch.bfloat16}
    half = loaded(folder).dit
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert all(
        torch.equal(a, b.bfloat16().float())
        for a, b in zip(half.parameters(), net.parameters(), strict=False)
    )


def test_control_that_public_weights_lack_must_be_asked_for_and_starts_at_zero(tmp_path):
    net = plain()
    folder = public(tmp_path / "wan", net)
    with pytest.raises(ValueError, match=r"missing: .*control.*") as error:
        loaded(folder, NANO)
    assert "set init.missing: [control]" in str(error.value)
    torch.manual_seed(0)
    controlled = loaded(folder, NANO, missing=("control",))
    assert same_where_named(controlled.dit, net)
    outputs = [p for k, p in controlled.named_parameters() if ".control." in k and "blocks" in k]
    assert len(outputs) == 12 and not any(p.any() for p in outputs)
    assert controlled.dit.control.action[0].weight.std() > 0.05


def same_where_named(net: nn.Module, other: nn.Module) -> bool:
    ours = net.state_dict()
    return all(torch.equal(ours[k], v) for k, v in other.state_dict().items())


def test_missing_names_whole_modules():
    source = WeightsSource(path="x", missing=("control", "dit.blocks.2"))
    for name in (
        "dit.control.action.0.weight",
        "dit.blocks.0.control.pose_q.bias",
        "dit.blocks.2.norm3.bias",
    ):
        assert source.may_lack(name)
    for name in ("dit.blocks.20.norm3.bias", "dit.controlled.weight", "words.weight"):
        assert not source.may_lack(name)


def test_public_weights_belong_to_the_factor_one(tmp_path):
    folder = public(tmp_path / "wan", plain())
    stretched = dataclasses.replace(PLAIN, rope_factor=2.0)
    with pytest.raises(ValueError, match=r"rope_factor=1.0, this network has 2.0.*restate"):
        loaded(folder, stretched)
    loaded(folder, stretched, rope_factor="restate")


# -- diffusers ----------------------------------------------------------------------------------------------


@pytest.fixture
def wan_model(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    # its loader wants accelerate only to keep these in float32, which everything is here
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)
    return diffusers.WanTransformer3DModel


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_diffusers_loads_what_is_written_and_computes_the_same(tmp_path, wan_model, shard_bytes):
    net = plain()
    folder = public(tmp_path / "wan", net, layout="diffusers", shard_bytes=shard_bytes)
    theirs = wan_model.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 3, 4, 4, 6, generator=generator)
    text = torch.randn(2, PLAIN.text_length, PLAIN.text_width, generator=generator)
    ours = net(latents, sigma=torch.full((2, 3), 0.437), text=text)
    out = theirs(
        rearrange(latents, "b t c h w -> b c t h w"),
        timestep=torch.full((2,), 437.0),
        encoder_hidden_states=text,
    ).sample
    error = (rearrange(out, "b c t h w -> b t c h w") - ours).abs().max() / ours.abs().max()
    assert error <= 1e-4  # their sinusoid of the noise level is float32, ours float64


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_what_diffusers_saves_loads(tmp_path, wan_model, max_shard_size):
    theirs = wan_model(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=256, ffn_dim=64, num_layers=2,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=max_shard_size)
    net = loaded(tmp_path)
    again = public(tmp_path / "again", net.dit, layout="diffusers")
    written = load_file(again / f"{STEM}.safetensors")
    assert written.keys() == theirs.state_dict().keys()
    assert all(torch.equal(written[k], v) for k, v in theirs.state_dict().items())
    config = json.loads((again / "config.json").read_text())
    saved = json.loads((tmp_path / "transformer" / "config.json").read_text())
    del config["_diffusers_version"]
    assert {k: v for k, v in saved.items() if k in config} == config


# -- what is refused ----------------------------------------------------------------------------------------


def test_weights_of_another_size_are_called_by_name(tmp_path):
    folder = public(tmp_path / "wan", plain(dataclasses.replace(PLAIN, width=64, depth=3)))
    with pytest.raises(ValueError) as error:
        loaded(folder)
    text = str(error.value)
    assert "width 64 in the file, 32 here; depth 3 in the file, 2 here" in text
    assert "Set net to the sizes of the file" in text and "unexpected: dit.blocks.2" in text
    assert "cross_attn.norm_q.weight: (64,) in the file, (32,) here" in text


def test_another_number_of_heads_is_refused_though_shapes_agree(tmp_path):
    more = dataclasses.replace(PLAIN, heads=4)
    for layout in ("original", "diffusers"):
        with pytest.raises(ValueError, match=r"trained with heads=2, this network has 4; set net.heads to 2"):
            loaded(public(tmp_path / layout, plain(), layout=layout), more)
    source = written(tmp_path / "w.safetensors", Denoiser(PLAIN))
    with pytest.raises(ValueError, match="trained with heads=2"):
        loaded(source.path, more)


def test_damaged_and_missing_shards_are_named_before_anything_is_loaded(tmp_path):
    folder = public(tmp_path / "wan", plain(), shard_bytes=20_000)
    source = WeightsSource(path=str(folder))
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[-1].read_bytes()
    shards[-1].write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"{shards[-1].name} is not a whole safetensors file"):
        check_source(source, kind="teacher")
    shards[-1].unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"names {len(shards)} shards, of which 1 .*{shards[-1].name}"
    ):
        check_source(source, kind="teacher")
    shutil.copy(shards[0], shards[-1])
    with pytest.raises(ValueError, match=r"disagree on where \d+ tensors are"):
        check_source(source, kind="teacher")
    shards[-1].write_bytes(whole)
    check_source(source, kind="teacher")
    index = folder / f"{STEM}.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match="not an index of shards: it needs a weight_map"):
        check_source(source, kind="teacher")
    index.unlink()
    with pytest.raises(ValueError, match=rf"{len(shards)} shards .* without their .*Copy the index there"):
        check_source(source, kind="teacher")


def test_folders_without_one_clear_answer_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors. Give a DiT's folder"):
        loaded(tmp_path)
    torch.save(plain().state_dict(), tmp_path / "net.pth")
    with pytest.raises(FileNotFoundError, match=r"It holds net.pth: give that file itself"):
        loaded(tmp_path)
    for name in ("a", "b"):
        save_file(plain().state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several weights: a.safetensors, b.safetensors. Give the path"):
        loaded(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No weights at .*give a checkpoint's file or folder"):
        loaded(tmp_path / "nowhere")


def test_torch_files_of_other_things_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    torch.save(plain().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a whole torch file"):
        loaded(path)
    torch.save({"net": plain()}, path)
    with pytest.raises(ValueError, match=r"holds objects beside tensors.*state dict alone"):
        loaded(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds a list; it must be a dict of tensors"):
        loaded(path)
    torch.save({**plain().state_dict(), "epoch": 3}, path)
    with pytest.raises(ValueError, match="dict of tensors; epoch is none"):
        loaded(path)
    torch.save({"state_dict": plain().state_dict(), "pytorch-lightning_version": "2.6"}, path)
    with pytest.raises(ValueError, match="is a Lightning checkpoint, which a run is resumed from"):
        loaded(path)
    path.rename(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt is none of .safetensors.*--ckpt_path"):
        loaded(tmp_path / "last.ckpt")
    twice = plain().state_dict()
    torch.save({**twice, "model.head.head.bias": twice["head.head.bias"]}, path)
    with pytest.raises(ValueError, match=r"1 tensors twice.*: head.head.bias"):
        loaded(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(tmp_path, dtype):
    tensors = {k: v.to(dtype) if "ffn" in k and v.ndim == 2 else v for k, v in plain().state_dict().items()}
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=rf"4 tensors of a dtype.*{dtype} in the file, torch.float32 here"):
        loaded(tmp_path / "net.safetensors")


def test_a_dtype_that_torch_lacks_is_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "net.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ValueError, match=r"x is stored as F4, which cannot be read; known are F64, F32"):
        loaded(path)


def test_a_pipeline_of_two_networks_is_ambiguous(tmp_path):
    net = plain()
    for name in ("transformer", "transformer_2"):
        public(tmp_path / name, net, layout="diffusers")
    with pytest.raises(ValueError, match=r"two networks \(Wan2.2\).*Give the path of one"):
        loaded(tmp_path)
    assert same(loaded(tmp_path / "transformer_2").dit, net)


@pytest.mark.slow
def test_loading_needs_little_more_host_memory_than_the_network(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks" / "load.py"), str(tmp_path / "shards")]
    sizes, kinds = ["--size=1b", "--depth=6", "--shards=4"], ["--dtype=float32", "--control", "--device=cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    out = subprocess.run(
        [*command, *sizes, *kinds], check=True, env=env, capture_output=True, text=True, timeout=240
    ).stdout
    print(out)
    assert float(re.search(r"above the target .* GB, ([\d.-]+) of a shard", out)[1]) <= 1.2


def test_what_the_layouts_cannot_say_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="camera control, which the original layout has no words for"):
        public(tmp_path / "a", DiT(NANO))
    with pytest.raises(ValueError, match=r"rope_factor=2.0, which the diffusers layout"):
        public(tmp_path / "a", DiT(dataclasses.replace(PLAIN, rope_factor=2.0)), layout="diffusers")
    public(tmp_path / "a", plain())
    with pytest.raises(FileExistsError, match="a exists; give a new folder"):
        public(tmp_path / "a", plain())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("control", "message"),
    [({"rays": 0.8}, None), ({"rays": 1.0}, "set net.control.rays to 0.8"),
     ({"rays": 0.0}, "control.rays=0.8, this network has 0.0"),
     ({"rays": 0.8, "inverse_depths": (0.5,)}, r"set net.control.inverse_depths to \[0.1, 0.0\]")],
)  # fmt: skip
def test_rays_are_those_that_weights_were_trained_with(control, message, tmp_path):
    sizes = {"width": 32, "depth": 1, "heads": 2, "ffn": 64, "latent_channels": 4, "text_width": 8}
    own = {"width": 8, "rays": 0.8, "inverse_depths": (0.1, 0.0)}
    config = DiTConfig(**sizes, control=ControlConfig(**own))
    first = Denoiser(config)
    path = tmp_path / "w.safetensors"
    save_weights(path, first.state_dict(), kind="teacher", config={"dit": dataclasses.asdict(config)})
    assert DiTConfig.from_dict(read_header(path, kind="teacher")["config"]["dit"]) == config
    second = Denoiser(DiTConfig(**sizes, control=ControlConfig(**(own | control))))
    bare = Denoiser(DiTConfig(**sizes, control=None))
    save_weights(
        tmp_path / "bare.safetensors", bare.state_dict(), kind="teacher",
        config={"dit": dataclasses.asdict(bare.dit.config)},
    )  # fmt: skip
    start = WeightsSource(path=str(tmp_path / "bare.safetensors"), missing=["control"])
    if second.dit.config.control.rays == 0:
        load_weights(second, start, kind="teacher")
    else:
        with pytest.raises(ValueError, match=r"trained without camera control; .* Set net.control.rays to 0"):
            load_weights(second, start, kind="teacher")
    source = WeightsSource(path=str(path))
    if message is not None:
        with pytest.raises(ValueError, match=f"(?i){message}"):
            load_weights(second, source, kind="teacher")
        return
    load_weights(second, source, kind="teacher")
    assert all(torch.equal(second.state_dict()[k], v) for k, v in first.state_dict().items())


@pytest.mark.parametrize("changes", [{"text_length": 9}, {"eps": 1e-5}])
def test_what_no_shape_tells_is_compared_by_name(changes, tmp_path):
    config = DiTConfig(width=32, depth=1, heads=2, ffn=64, latent_channels=4, text_width=8, text_length=6)
    save_weights(
        tmp_path / "w.safetensors", Denoiser(config).state_dict(), kind="teacher",
        config={"dit": dataclasses.asdict(config)},
    )  # fmt: skip
    (name,) = changes
    with pytest.raises(ValueError, match=f"set net.{name} to {getattr(config, name)}"):
        load_weights(
            Denoiser(dataclasses.replace(config, **changes)),
            WeightsSource(path=str(tmp_path / "w.safetensors")),
            kind="teacher",
        )
