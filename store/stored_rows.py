"""Rows of a store's arrays, in the way that suits how and where each is stored."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from store.array_forms import RowShards, read_form
from store.errors import StoreError
from store.layout import METADATA, ArrayLayout
from store.local_shards import LocalShards, OpenShards, Verify
from store.remote import StorePath
from store.remote_shards import RemoteShards

_CACHED_BYTES = 2**20
"""Codes that a core's cache still holds when they are decoded."""


@runtime_checkable
class _ArrayRows(Protocol):
    def open(self, rows: list[int]) -> None: ...

    def read_into(self, rows: list[int], out: NDArray[Any], threads: int) -> None: ...


class StoredRows:
    """Reads rows and keeps shards open; safe to share between threads and across a fork."""

    def __init__(self, path: StorePath, verify: Verify) -> None:
        self._path = path
        self._verify = verify
        self._open = OpenShards()
        self._arrays: dict[tuple[str, str], _ArrayRows] = {}

    def add(self, teacher: str, layout: ArrayLayout) -> None:
        """Choose how an array is read, from its metadata; to be called before its rows are read.

        Raises:
            StoreDamagedError: the metadata is not that of `layout`.
        """
        form = read_form(self._path / teacher / layout.path / METADATA, layout)
        self._arrays[teacher, layout.path] = self._choose(self._path / teacher, layout, form)

    def _choose(
        self, folder: StorePath, layout: ArrayLayout, form: ArrayLayout | RowShards | None
    ) -> _ArrayRows:
        """Return what reads an array, see the table in `store.array_forms`."""
        if isinstance(form, ArrayLayout):
            if isinstance(folder, Path):
                return LocalShards(folder, layout, self._open, self._verify)
            return RemoteShards(folder, layout)
        if isinstance(form, RowShards) and isinstance(folder, Path):
            from store.compressed_shards import CompressedShards  # only where it is asked for

            return CompressedShards(folder, layout, form, self._open, self._verify)
        from store.zarr_rows import ZarrRows  # only where it is asked for: imports zarr

        return ZarrRows(folder, layout)

    def open(self, teacher: str, layout: ArrayLayout, rows: list[int]) -> None:
        """Make ready to read `rows`: their shards are known to be whole, and disks are at work.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or its index is damaged.
        """
        self._arrays[teacher, layout.path].open(rows)

    def read_into(
        self, teacher: str, layout: ArrayLayout, rows: list[int], out: NDArray[Any], threads: int
    ) -> None:
        """Fill `out` (n, ...), of the array's type and contiguous, with the entries at `rows`.

        Faster after `open` with the same rows, where they are not in memory yet.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or a checksum does not match.
        """
        self._arrays[teacher, layout.path].read_into(rows, out, threads)

    def portion(self, layout: ArrayLayout, rows: int) -> int:
        """Return how many of `rows` to read, then decode, at a time."""
        return max(1, _CACHED_BYTES // layout.row_bytes if isinstance(self._path, Path) else rows)


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
