"""Shards, their index, and the data module that trains from them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relic.data.clips import read_clips
    from relic.data.datamodule import PlainVideo, WorldDataModule
    from relic.data.index import Index, write_index
    from relic.data.shards import pack_clip, pack_sample, read_clip, unpack_sample, write_shard

__all__ = [
    "Index",
    "PlainVideo",
    "WorldDataModule",
    "pack_clip",
    "pack_sample",
    "read_clip",
    "read_clips",
    "unpack_sample",
    "write_index",
    "write_shard",
]

# names are looked up when used, so that writing shards needs no Lightning
_HOMES = {
    "Index": "index",
    "PlainVideo": "datamodule",
    "WorldDataModule": "datamodule",
    "pack_clip": "shards",
    "pack_sample": "shards",
    "read_clip": "shards",
    "read_clips": "clips",
    "unpack_sample": "shards",
    "write_index": "index",
    "write_shard": "shards",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
