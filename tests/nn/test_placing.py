import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from relic.nn.denoiser import Denoiser
from relic.nn.placing import fresh_values, place
from relic.nn.tensor_files import TensorsInMemory
from tests.worlds import NANO, NANO_WORDS


def filled(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=generator)
    return net


def on_meta(dtype: torch.dtype = torch.float32) -> Denoiser:
    with torch.device("meta"):
        return Denoiser(NANO, NANO_WORDS).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_on_meta_gets_its_own_memory_and_keeps_its_dtype(dtype):
    source, net = filled(Denoiser(NANO, NANO_WORDS)), on_meta(dtype)
    net.words.weight.requires_grad_(False)
    place(net, TensorsInMemory(source.state_dict()), device="cpu")
    for name, value in source.state_dict().items():
        own = net.state_dict()[name]
        assert own.dtype == dtype and torch.equal(own, value.to(dtype))
        assert own.data_ptr() != value.data_ptr()
    assert not net.words.weight.requires_grad and net.dit.head.head.weight.requires_grad


def test_a_network_in_memory_is_filled_in_place():
    source, net = filled(Denoiser(NANO)), Denoiser(NANO)
    before = {name: p.data_ptr() for name, p in net.named_parameters()}
    place(net, TensorsInMemory(source.state_dict()))
    assert before == {name: p.data_ptr() for name, p in net.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), source.parameters(), strict=True))


def test_a_network_on_meta_must_be_told_where_to_go():
    source = Denoiser(NANO, NANO_WORDS)
    for device in (None, "meta"):
        with pytest.raises(ValueError, match="on the meta device; say with device="):
            place(on_meta(), TensorsInMemory(source.state_dict()), device=device)


def test_fresh_values_are_those_of_a_fresh_network_and_leave_the_rest_alone():
    net = on_meta()
    names = [name for name in net.state_dict() if "control" in name or "words" in name]
    torch.manual_seed(3)
    values = dict(fresh_values(net, names).tensors)
    assert set(values) == set(names) and all(p.is_meta for p in net.parameters())
    for name, value in values.items():
        if ".blocks." in name or "words" in name or name.endswith("bias"):
            assert not value.any(), name
        else:
            bound = (6 / sum(value.shape)) ** 0.5  # Xavier
            assert 0.5 * bound < value.abs().max() <= bound
    torch.manual_seed(3)
    filled_net = filled(Denoiser(NANO, NANO_WORDS))
    kept = {name: p.clone() for name, p in filled_net.named_parameters()}
    torch.manual_seed(3)
    again = fresh_values(filled_net, names).tensors
    assert all(torch.equal(again[name], values[name]) for name in names)
    assert all(torch.equal(p, kept[name]) for name, p in filled_net.named_parameters())


def test_only_what_is_lacking_takes_memory_while_it_is_drawn():
    class Watched(Denoiser):
        def reset_parameters(self) -> None:
            self.in_memory = {name for name, p in self.named_parameters() if not p.is_meta}
            super().reset_parameters()

    with torch.device("meta"):
        net = Watched(NANO, NANO_WORDS)
    fresh_values(net, ["words.weight"])
    assert net.in_memory == {"words.weight"}


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match="Sequential has no reset_parameters"):
        fresh_values(nn.Sequential(nn.Linear(1, 1)), ["0.weight"])
    with pytest.raises(ValueError, match="mean are buffers"):
        fresh_values(Denoiser(NANO), ["mean"])


SHARDED = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from relic.nn.checkpoints import WeightsSource, load_weights
from relic.nn.denoiser import Denoiser
from relic.nn.dit import DiT
from relic.nn.placing import local_span, place
from relic.ops.actions import controls_of
from tests.nn.test_placing import uneven
from tests.worlds import NANO, batch

path, plain = sys.argv[1], sys.argv[2]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))

def sharded(**context):
    with torch.device(context["device"]):
        net = Denoiser(NANO)
    for block in net.dit.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net

whole = Denoiser(NANO)
torch.manual_seed(5)
load_weights(whole, WeightsSource(path=path), kind="teacher")
data = batch([0, 1])
inputs = dict(sigma=torch.rand(2, 3), text=torch.randn(2, 5, 8), controls=controls_of(data.actions))
for name in ("gloo", "cpu"):
    net = sharded(device="meta" if name == "gloo" else "cpu")
    load_weights(net, WeightsSource(path=path), kind="teacher")
    for key, value in net.state_dict().items():
        assert isinstance(value, DTensor) and value.to_local().device.type == "cpu", key
        assert torch.equal(value.full_tensor(), whole.state_dict()[key]), key
    assert sum(v.to_local().numel() for v in net.state_dict().values()) < 0.6 * sum(
        p.numel() for p in whole.parameters())
    out = net(data.latents, **inputs)
    torch.testing.assert_close(out, whole(data.latents, **inputs), rtol=0, atol=1e-6)
    out.square().mean().backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = {k: v.full_tensor().clone() for k, v in net.state_dict().items()}
    optimizer.step()
    assert any(not torch.equal(v.full_tensor(), before[k]) for k, v in net.state_dict().items())

# what public weights lack is drawn alike on all ranks, whatever the sharding
fresh = sharded(device="meta")
torch.manual_seed(5)
load_weights(fresh, WeightsSource(path=plain, missing=("control",)), kind="teacher")
with torch.device("meta"):
    single = Denoiser(NANO)
torch.manual_seed(5)
load_weights(single, WeightsSource(path=plain, missing=("control",)), kind="teacher", device="cpu")
for key, value in fresh.state_dict().items():
    assert torch.equal(value.full_tensor(), single.state_dict()[key]), key

# uneven rows, empty parts, columns, replicas: as torch itself distributes
for shape, placement in uneven():
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    theirs = distribute_tensor(tensor, mesh, [placement])
    span = local_span(theirs)
    assert torch.equal(tensor[span], theirs.to_local()), (shape, placement)
dist.barrier()
os._exit(0)  # gloo's threads at times abort the interpreter's own exit
"""


def uneven():
    from torch.distributed.tensor import Replicate, Shard

    return [((5, 3), Shard(0)), ((1, 3), Shard(0)), ((4, 7), Shard(1)), ((3, 2), Replicate())]


@pytest.mark.slow
def test_each_rank_of_a_sharded_network_reads_its_own_part(tmp_path):
    from relic.nn.checkpoints import save_weights
    from relic.nn.tensor_files import Stored
    from relic.nn.tensor_writer import write_shards

    net = filled(Denoiser(NANO))
    config = {"dit": dataclasses.asdict(NANO)}
    save_weights(tmp_path / "own.safetensors", net.state_dict(), kind="teacher", config=config)
    values = {k: v for k, v in net.dit.state_dict().items() if "control" not in k}
    entries = {k: Stored(tuple(v.shape), v.dtype) for k, v in values.items()}
    write_shards(tmp_path / "public", entries, values.items(), shard_bytes=20_000)
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script),
        str(tmp_path / "own.safetensors"), str(tmp_path / "public"),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=env, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
