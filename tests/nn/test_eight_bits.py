import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from relic.nn.checkpoints import WeightsSource, load_weights, read_header, write_weights
from relic.nn.eight_bits import FromEightBits, InEightBits, rounded
from relic.nn.tensor_files import SafetensorsFiles, TensorsInMemory


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 128, generator=draw) * torch.logspace(-6, 3, 64)[:, None]  # rows of all sizes
    matrix[3] = 0
    kernel = torch.randn(32, 16, 1, 4, 4, generator=draw).bfloat16()
    return {
        "a.weight": matrix, "a.bias": torch.randn(64, generator=draw), "b.kernel": kernel,
        "c.small": torch.randn(4, 4, generator=draw), "d.count": torch.arange(9000).reshape(90, 100),
    }  # fmt: skip


def test_every_number_of_a_row_is_within_half_a_unit():
    matrix = tensors()["a.weight"]
    values, unit = rounded(matrix)
    assert values.dtype == torch.int8 and unit.shape == (64, 1) and unit.dtype == torch.float32
    assert bool(((values * unit - matrix).abs() <= unit * 0.5001).all())
    assert (
        values.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 60
    )  # the largest is kept to the last bit


def test_a_file_holds_matrices_in_8_bits_and_is_read_as_floats(tmp_path):
    path = tmp_path / "small.safetensors"
    write_weights(path, InEightBits(TensorsInMemory(tensors())), kind="student", config={"x": 1})
    stored, own = load_file(path), tensors()
    whole = sum(t.numel() * t.element_size() for t in own.values() if t.is_floating_point())
    assert stored["a.weight"].dtype == stored["b.kernel"].dtype == torch.int8
    assert path.stat().st_size < 0.5 * whole + 72_000 + 4096  # the whole numbers are kept as they are
    opened = FromEightBits(SafetensorsFiles(path))
    read = {name: (opened.entries[name], tensor(None).clone()) for name, tensor in opened.stream()}
    assert read.keys() == own.keys() == opened.entries.keys()
    for name, (entry, tensor) in read.items():
        assert entry.shape == tuple(tensor.shape) and entry.dtype == tensor.dtype
        if name in ("a.weight", "b.kernel"):
            values, unit = rounded(own[name])
            assert torch.equal(tensor, values.float() * unit)
        else:
            assert torch.equal(tensor, own[name])
    spans = {name: tensor((slice(8, 24), slice(2, 9))) for name, tensor in opened.stream() if "a.w" in name}
    assert torch.equal(spans["a.weight"], read["a.weight"][1][8:24, 2:9])


def test_a_network_loads_them_as_any_weights_and_a_matrix_without_its_units_is_refused(tmp_path):
    layer = torch.nn.Linear(128, 64)
    path = tmp_path / "layer.safetensors"
    write_weights(path, InEightBits(TensorsInMemory(layer.state_dict())), kind="student", config={})
    other = torch.nn.Linear(128, 64)
    load_weights(other, WeightsSource(path=str(path)), kind="student")
    values, unit = rounded(layer.weight)
    assert torch.equal(other.weight, values.float() * unit) and torch.equal(other.bias, layer.bias)
    broken = load_file(path)
    del broken["weight.unit"]
    save_file(broken, path, metadata={"relic": _header(path)})
    with pytest.raises(ValueError, match=r"weight: torch\.int8 in the file, torch\.float32 here"):
        load_weights(other, WeightsSource(path=str(path)), kind="student")


def _header(path: Path) -> str:
    return json.dumps({"format": "relic-weights/1", **read_header(path)})
