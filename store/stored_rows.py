"""Rows of a store's arrays, from a folder or from object storage."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from upath import UPath

from store.codecs import Codes
from store.layout import ArrayLayout
from store.remote import StorePath
from store.remote_shards import RemoteShards
from store.shard import ShardReader

_OPEN_SHARDS = 256  # well below the usual limit of 1024 open files


class StoredRows:
    """Reads rows and keeps shards open; safe to share between threads and across a fork."""

    def __init__(self, path: StorePath) -> None:
        self._path = path
        self._layouts: dict[tuple[str, str], ArrayLayout] = {}
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)
        self._remote: dict[tuple[str, str], RemoteShards] = {}

    def read(self, teacher: str, layout: ArrayLayout, rows: list[int]) -> Codes:
        """Return the entries of an array at `rows` (n,) as stored, one (n, ...) array.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or a checksum does not match.
        """
        if not isinstance(self._path, Path):
            return self._remote_shards(self._path, teacher, layout).read(rows)
        self._layouts[teacher, layout.path] = layout
        out: Codes | None = None
        for position, row in enumerate(rows):
            number, slot = divmod(row, layout.chunk[0])
            shard = self._shard(teacher, layout.path, number)
            if out is None:  # only now is it known that the file is as large as the metadata says
                out = np.empty((len(rows), *layout.shape[1:]), layout.dtype)
            shard.read_into(slot, out[position])
        return np.empty((0, *layout.shape[1:]), layout.dtype) if out is None else out

    def _open_shard(self, teacher: str, name: str, number: int) -> ShardReader:
        assert isinstance(self._path, Path)
        return ShardReader(self._path / teacher, self._layouts[teacher, name], number)

    def _remote_shards(self, path: UPath, teacher: str, layout: ArrayLayout) -> RemoteShards:
        key = teacher, layout.path
        if key not in self._remote:
            self._remote[key] = RemoteShards(path / teacher, layout)
        return self._remote[key]
