import sys
from dataclasses import replace

import pytest
import torch

from relic.nn.checkpoints import WeightsSource, load_weights, save_weights
from relic.nn.control import is_control
from relic.nn.denoiser import Denoiser
from relic.nn.tuning import ControlFirst, FullTuning, LowRank
from relic.ops.actions import controls_of
from tests.worlds import NANO, NANO_WORDS, batch


def network(config=NANO) -> Denoiser:
    torch.manual_seed(0)
    net = Denoiser(config, NANO_WORDS)
    torch.nn.init.normal_(net.dit.head.head.weight)  # else every velocity is zero
    return net


def velocity(net, *, controls=True):
    data = batch([0, 1])
    sigma = torch.full(data.latents.shape[:2], 0.5)
    told = controls_of(data.actions) if controls else None
    return net(data.latents, sigma=sigma, text=data.text, controls=told)


def test_a_low_rank_update_starts_as_the_network_it_is_beside():
    net, draws = network(), torch.get_rng_state()
    before = velocity(net)
    LowRank(rank=2).prepare(net, seed=0)
    assert torch.equal(velocity(net), before)
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_low_rank_update_learns_beside_control_and_nothing_else_does():
    net = network()
    LowRank(rank=2).prepare(net, seed=0)
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name in learning if ".lora_" not in name} == {
        name for name in net.state_dict() if is_control(name)
    }
    adapted = {name.split(".lora_")[0] for name in learning if ".lora_" in name}
    layers = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn.0", "ffn.2"]
    assert adapted == {f"dit.blocks.{i}.{layer}" for i in range(2) for layer in layers}


def test_plain_weights_are_the_base_plus_the_merged_update():
    net, tuning = network(), LowRank(rank=2, alpha=6.0)
    plain = {name: value.clone() for name, value in net.state_dict().items()}
    tuning.prepare(net, seed=0)
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    merged, told = tuning.plain_weights(net), net.state_dict()
    assert merged.keys() == plain.keys()
    for name, value in plain.items():
        stem = name.removesuffix(".weight")
        a, b = (told.get(f"{stem}.lora_{which}.default.weight") for which in "AB")
        expected = value if a is None or name == stem else value + 3.0 * b @ a
        torch.testing.assert_close(merged[name], expected, msg=name)
    rebuilt = network()
    rebuilt.load_state_dict(merged)
    torch.testing.assert_close(velocity(rebuilt), velocity(net), atol=1e-4, rtol=1e-4)


def test_updates_are_the_same_for_equal_seeds():
    def update(seed):
        net = network()
        LowRank(rank=2).prepare(net, seed=seed)
        return net.dit.blocks[0].ffn[0].lora_A["default"].weight

    assert torch.equal(update(4), update(4)) and not torch.equal(update(4), update(5))


def test_control_first_trains_control_until_its_steps_are_over():
    tuning, names = ControlFirst(control_steps=3), list(network().state_dict())
    assert {n for n in names if tuning.trains(n, step=2)} == {n for n in names if is_control(n)}
    assert all(tuning.trains(n, step=3) for n in names)
    assert all(FullTuning().trains(n, step=0) for n in names)


def test_a_plain_file_starts_a_network_with_control_and_nothing_else_may_lack(tmp_path):
    plain, path = network(replace(NANO, control=None)), tmp_path / "plain.safetensors"
    config = {"dit": {"rope_factor": 1.0}}
    save_weights(path, plain.state_dict(), kind="teacher", config=config)
    net = network()
    with pytest.raises(ValueError, match=r"missing: dit\.blocks\.0\.control"):
        load_weights(net, WeightsSource(path=str(path)), kind="teacher")
    source = WeightsSource(path=str(path), missing=("control",))
    load_weights(net, source, kind="teacher")
    assert torch.equal(velocity(net), velocity(plain))
    lacking = {name: value for name, value in plain.state_dict().items() if "blocks.0.ffn" not in name}
    save_weights(path, lacking, kind="teacher", config=config)
    with pytest.raises(ValueError, match=r"4 missing: dit\.blocks\.0\.ffn"):
        load_weights(net, source, kind="teacher")


def test_another_rope_factor_lasts_for_a_while_and_leaves_the_network_as_it_was():
    net = network()
    before = velocity(net)
    with net.at_rope_factor(4.0):
        stretched = velocity(net)
    assert torch.equal(stretched, velocity(network(replace(NANO, rope_factor=4.0))))
    assert not torch.equal(stretched, before) and torch.equal(velocity(net), before)


def test_wrong_settings_are_named(monkeypatch):
    with pytest.raises(ValueError, match="control_steps=0 must be at least 1"):
        ControlFirst(control_steps=0)
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        LowRank(rank=0)
    with pytest.raises(ValueError, match=r"set net\.control"):
        ControlFirst(control_steps=1).prepare(network(replace(NANO, control=None)), seed=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'relic-world\[peft\]'"):
        LowRank(rank=1).prepare(network(), seed=0)
