import dataclasses

import pytest
import torch

from relic.nn.checkpoints import WeightsSource, file_sha256, load_weights, read_header, save_weights
from relic.nn.denoiser import Denoiser
from tests.worlds import NANO, NANO_WORDS


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
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="'no format'"):
        read_header(tmp_path / "foreign.safetensors")
