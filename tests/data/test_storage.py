from __future__ import annotations

import io
import os
import pickle
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from relic.data import WorldDataModule
from relic.data.storage import RangeFile, Storage
from relic.types import ClipSpec


class Ranges(SimpleHTTPRequestHandler):
    """Serves byte ranges, as object stores do."""

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted:
            return super().do_GET()
        first, last = map(int, wanted.groups())
        data = Path(self.translate_path(self.path)).read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return self.wfile.write(data) and None

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def served(walks: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=walks))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def in_memory(walks: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(str(walks), "/walks", recursive=True)
    yield "memory://walks"
    memory.rm("/walks", recursive=True)


def batches(root: str, *, workers: int = 0) -> list[torch.Tensor]:
    data = WorldDataModule(
        root=root, clip=ClipSpec(height=64, width=64, horizons=(17,)), global_batch=2, batches_per_epoch=2,
        workers=workers,
    )  # fmt: skip
    data.setup("fit")
    return [batch.video for batch in data.train_dataloader()]


def test_memory_equals_the_folder(walks: Path, in_memory: str) -> None:
    assert all(map(torch.equal, batches(in_memory), batches(str(walks))))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_http_equals_the_folder(walks: Path, served: str, workers: int) -> None:
    assert all(map(torch.equal, batches(served, workers=workers), batches(str(walks))))


def test_reading_past_the_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    storage = Storage(tmp_path)
    assert storage.read("a") == b"0123456789"
    assert storage.read("a", offset=3, length=4) == b"3456"
    with pytest.raises(OSError, match="got 2 of 5 bytes at 8"):
        storage.read("a", offset=8, length=5)


def test_handles_stay_with_their_process_and_are_few(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for number in range(100):
        (tmp_path / str(number)).write_bytes(b"x")
        storage.read(str(number))
    assert len(storage._handles) <= 64
    assert pickle.loads(pickle.dumps(storage))._handles == {}
    child = os.fork()
    if child == 0:
        os._exit(0 if storage.read("3") == b"x" and len(storage._handles) == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_range_is_a_file() -> None:
    data = bytes(range(256)) * 8
    reads: list[int] = []

    def read(offset: int, length: int) -> bytes:
        reads.append(length)
        return data[offset : offset + length]

    file, plain = RangeFile(read, len(data), block=100), io.BytesIO(data)
    for seek, whence, size in ((0, 0, 10), (0, 1, 10), (-20, 2, 30), (500, 0, 300), (5, 1, 0), (0, 0, -1)):
        assert file.seek(seek, whence) == plain.seek(seek, whence)
        assert file.read(size) == plain.read(size)
    assert reads[0] == 100, "a block is read ahead"
    assert len(reads) == 4, "the second read came from the block"
