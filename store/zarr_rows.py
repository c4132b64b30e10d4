"""Reads rows of an array through zarr, where this package knows no faster way."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from store.errors import StoreDamagedError, StoreError
from store.layout import ArrayLayout
from store.remote import StorePath, remote_errors


class ZarrRows:
    """The rows of one array; safe to share between threads and across a fork."""

    def __init__(self, folder: StorePath, layout: ArrayLayout) -> None:
        self._path = folder / layout.path
        self._layout = layout
        self._made: tuple[int, zarr.Array[Any]] | None = None

    def open(self, rows: list[int]) -> None:
        """Open the array; which of `rows` it has shows when they are read.

        Raises:
            StoreDamagedError: zarr cannot read an array like this.
        """
        self._array()

    def read_into(self, rows: list[int], out: NDArray[Any], threads: int) -> None:
        """Fill `out` (n, ...) with the entries of the array at `rows` (n,); zarr has its threads.

        Raises:
            StoreDamagedError: a row does not decode, or holds nothing but the fill value, which is
                what zarr returns where a chunk is missing.
        """
        array = self._array()
        try:
            with remote_errors(self._path):
                out[...] = array.oindex[np.asarray(rows, np.int64)]
        except StoreError:
            raise
        except Exception as error:  # codecs raise what they like
            raise self._damaged(f"zarr cannot read its rows: {error!r:.200}") from error
        empty = np.isnan(out) if out.dtype.kind == "f" else out == 0
        missing = np.flatnonzero(empty.all(axis=tuple(range(1, out.ndim))))
        if len(missing):
            raise self._damaged(f"row {rows[missing[0]]} was never written, or its file is missing")

    def _array(self) -> "zarr.Array[Any]":
        if self._made is None or self._made[0] != os.getpid():  # connections do not survive a fork
            try:
                with remote_errors(self._path):
                    self._made = os.getpid(), open_zarr(self._path)
            except StoreError:
                raise
            except Exception as error:  # metadata can be wrong in many ways
                raise self._damaged(f"zarr cannot open it: {error!r:.200}") from error
        return self._made[1]

    def _damaged(self, reason: str) -> StoreDamagedError:
        return StoreDamagedError(
            f"{self._path} cannot be used: {reason}; another tool than `sak` wrote this array: "
            "write it anew with that tool, or delete it and run `sak extract-teachers` again"
        )


def open_zarr(path: StorePath) -> "zarr.Array[Any]":
    """Return zarr's own view of the array at a path."""
    if isinstance(path, Path):
        return zarr.open_array(path, mode="r")
    options = dict(path.storage_options) or None
    return zarr.open_array(str(path), mode="r", storage_options=options)
