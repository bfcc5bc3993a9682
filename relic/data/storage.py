"""Read parts of files in a dataset: pread in a local folder, range requests through fsspec elsewhere."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import fsspec

__all__ = ["RangeFile", "Storage"]

OPEN_FILES: Final = 64
REMOTE_BLOCK: Final = 1 << 20  # bytes: a request costs about as much as a megabyte
LOCAL_BLOCK: Final = 1 << 16


class Storage:
    """A dataset's folder or fsspec URL. Each process opens its own handles, so it may be sent to workers.

    Args:
        root: A folder, or a URL such as `s3://bucket/dataset` or `https://host/dataset`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root).rstrip("/") or "/"
        self.is_local = "://" not in self.root and "::" not in self.root
        if self.root.startswith("file://"):
            self.root, self.is_local = self.root.removeprefix("file://"), True
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._system: Any = None
        self._base = self.root

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "is_local": self.is_local}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes of a file from `offset`, or all to its end.

        Raises:
            OSError: If the file cannot be read or ends before.
        """
        if self.is_local:
            handle = self._handle(path)
            wanted = os.fstat(handle).st_size - offset if length is None else length
            data = os.pread(handle, wanted, offset)
        else:
            system, base = self._remote()
            end = None if length is None else offset + length
            data = system.cat_file(f"{base}/{path}", start=offset, end=end)
            wanted = len(data) if length is None else length
        if len(data) != wanted:
            raise OSError(f"{self.root}/{path}: got {len(data)} of {wanted} bytes at {offset}.")
        return data

    def open_range(self, path: str, *, offset: int, length: int) -> RangeFile:
        """Return a seekable file of a byte range, which fetches only what is read of it."""
        block = LOCAL_BLOCK if self.is_local else REMOTE_BLOCK
        return RangeFile(
            lambda start, size: self.read(path, offset=offset + start, length=size), length, block=block
        )

    def exists(self, path: str) -> bool:
        if self.is_local:
            return Path(self.root, path).exists()
        system, base = self._remote()
        return bool(system.exists(f"{base}/{path}" if path else base))

    def size(self, path: str) -> int | None:
        """Return the size of a file in bytes, or None if there is none."""
        try:
            if self.is_local:
                return Path(self.root, path).stat().st_size
            system, base = self._remote()
            return int(system.size(f"{base}/{path}"))
        except FileNotFoundError:
            return None

    def _handle(self, path: str) -> int:
        self._after_fork()
        if path in self._handles:
            self._handles.move_to_end(path)
        else:
            self._handles[path] = os.open(Path(self.root, path), os.O_RDONLY)
            if len(self._handles) > OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
        return self._handles[path]

    def _remote(self) -> tuple[Any, str]:
        self._after_fork()
        if self._system is None:
            # instances hold an event loop that does not survive a fork, hence no shared one
            self._system, self._base = fsspec.core.url_to_fs(self.root, skip_instance_cache=True)
        return self._system, self._base

    def _after_fork(self) -> None:
        if self._owner == os.getpid():
            return
        if not self.is_local:
            fsspec.asyn.reset_lock()
            fsspec.asyn.iothread[0] = fsspec.asyn.loop[0] = None
        self._forget()


class RangeFile(io.RawIOBase):
    """A seekable read-only file over `read(offset, length)`, with one block read ahead.

    Args:
        read: Returns bytes of the range.
        length: Bytes in the range.
        block: The least number of bytes fetched at a time.
    """

    def __init__(self, read: Callable[[int, int], bytes], length: int, *, block: int = LOCAL_BLOCK) -> None:
        self._read, self._length, self._block = read, length, block
        self._position = self._held_from = 0
        self._held = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        size = left if size < 0 else min(size, left)
        start = self._position - self._held_from
        if size and not 0 <= start <= start + size <= len(self._held):
            self._held = self._read(self._position, min(left, max(size, self._block)))
            self._held_from, start = self._position, 0
        self._position += size
        return self._held[start : start + size]

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
