import pytest
import torch
from safetensors.torch import load_file, save_file

from relic.nn.tensor_files import DTYPES, SafetensorsFiles, Stored
from relic.nn.tensor_writer import open_writer, write_shards

TENSORS = {
    **{f"t{i}": torch.arange(15).reshape(3, 5).to(dtype) for i, dtype in enumerate(DTYPES.values())},
    "scalar": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
    "turned": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).T,
}
ENTRIES = {name: Stored(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


@pytest.mark.parametrize("metadata", [{}, {"relic": '{"kind": "übung"}'}])
def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path, metadata):
    with open_writer(tmp_path / "ours", ENTRIES, metadata=metadata) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    theirs = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(theirs, tmp_path / "theirs", metadata=metadata or None)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_takes_its_name_only_when_it_is_whole(tmp_path):
    with (
        pytest.raises(AssertionError, match=r"14 tensors of .* were never written"),
        open_writer(tmp_path / "w.safetensors", ENTRIES, metadata={}) as writer,
    ):
        writer.write("scalar", TENSORS["scalar"])
    assert not list(tmp_path.iterdir())


def test_shards_hold_what_fits_and_the_index_says_where(tmp_path):
    values = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    entries = {name: Stored((100,), torch.float32) for name in values}
    files = write_shards(tmp_path, entries, values.items(), stem="net", shard_bytes=900)
    assert [f.name for f in files] == [f"net-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [sorted(load_file(f)) for f in files] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    again = SafetensorsFiles(tmp_path / "net.safetensors.index.json")
    assert again.entries == entries
    assert all(torch.equal(read(None), values[name]) for name, read in again.stream())


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    values = {"a": torch.zeros(10), "b": torch.zeros(1000), "c": torch.zeros(10)}
    entries = {name: Stored(tuple(t.shape), t.dtype) for name, t in values.items()}
    assert len(write_shards(tmp_path, entries, values.items(), shard_bytes=100)) == 3


def test_a_dtype_without_a_name_in_safetensors_is_refused(tmp_path):
    entries = {"x": Stored((1,), torch.complex128)}
    with (
        pytest.raises(ValueError, match=r"x has dtype torch.complex128, safetensors can hold .*; cast it"),
        open_writer(tmp_path / "x", entries, metadata={}),
    ):
        pass
