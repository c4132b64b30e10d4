"""Rows of a store's arrays, from a folder or from object storage."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError
from store.layout import ArrayLayout
from store.local_shards import LocalShards, OpenShards, Verify
from store.remote import StorePath
from store.remote_shards import RemoteShards

_CACHED_BYTES = 2**20
"""Codes that a core's cache still holds when they are decoded."""


class StoredRows:
    """Reads rows and keeps shards open; safe to share between threads and across a fork."""

    def __init__(self, path: StorePath, verify: Verify) -> None:
        self._path = path
        self._verify = verify
        self._open = OpenShards()
        self._arrays: dict[tuple[str, str], LocalShards | RemoteShards] = {}

    def open(self, teacher: str, layout: ArrayLayout, rows: NDArray[np.int64]) -> None:
        """Make ready to read `rows`: their shards are known to be whole, and disks are at work.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or its index is damaged.
        """
        self._shards(teacher, layout).open(rows)

    def read_into(
        self, teacher: str, layout: ArrayLayout, rows: NDArray[np.int64], out: NDArray[Any]
    ) -> None:
        """Fill `out` (n, ...), of the array's type and contiguous, with the entries at `rows`.

        Faster after `open` with the same rows, where they are not in memory yet.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or a checksum does not match.
        """
        self._shards(teacher, layout).read_into(rows, out)

    def portion(self, layout: ArrayLayout, rows: int) -> int:
        """Return how many of `rows` to read, then decode, at a time."""
        return max(1, _CACHED_BYTES // layout.row_bytes if isinstance(self._path, Path) else rows)

    def _shards(self, teacher: str, layout: ArrayLayout) -> LocalShards | RemoteShards:
        key = teacher, layout.path
        if key not in self._arrays:
            folder = self._path / teacher
            self._arrays[key] = (
                LocalShards(folder, layout, self._open, self._verify)
                if isinstance(folder, Path)
                else RemoteShards(folder, layout)
            )
        return self._arrays[key]


def refuse_buffer(out: NDArray[Any], shape: tuple[int, ...], dtype: str) -> None:
    """Refuse a buffer that rows cannot be read into.

    Raises:
        StoreError: it has another shape or type, is not contiguous, or may not be written to.
    """
    if out.shape != shape or out.dtype != np.dtype(dtype):
        raise StoreError(
            f"out is {out.dtype} {out.shape}, it should be {np.dtype(dtype)} {shape}: "
            "one entry for each row asked for"
        )
    if not out.flags.c_contiguous or not out.flags.writeable:
        what = "is not contiguous" if out.flags.writeable else "is read-only"
        raise StoreError(f"out {what}: pass an array of its own, or a slice of one's first axis")
