"""Reads rows of shards that another tool wrote in a folder, decoding them in threads."""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray

from store.array_forms import RowShards
from store.chunks import checksum
from store.errors import StoreDamagedError
from store.layout import CHECKSUM_BYTES, INDEX_ENTRY_BYTES, ArrayLayout
from store.local_shards import OpenShards, Verify
from store.shard import EMPTY
from store.threads import each_in_threads

_BLOSC_HEADER = 16
_GZIP = 16 + zlib.MAX_WBITS


class CompressedShards:
    """The shards of one array; safe to share between threads and across a fork.

    Checksums, where there are any, are compared at every read unless `verify` is "never".
    """

    def __init__(
        self,
        folder: Path,
        layout: ArrayLayout,
        form: RowShards,
        shards: OpenShards,
        verify: Verify,
    ) -> None:
        self._folder, self._layout, self._form = folder, layout, form
        self._sealed = form.sealed and verify != "never"
        self._shards = shards

    def open(self, rows: list[int]) -> None:
        """Open the shards that hold `rows`.

        Raises:
            StoreDamagedError: a shard is missing, or its index is damaged.
        """
        for number in {row // self._form.rows for row in rows}:
            self._shards.get(self, number)

    def open_shard(self, number: int) -> "_Shard":
        """Return a shard that was not open."""
        return _Shard(self._folder / self._form.file_path(self._layout, number), self._form)

    def read_into(self, rows: list[int], out: NDArray[Any], threads: int) -> None:
        """Fill `out` (n, ...) with the entries of the array at `rows` (n,), in `threads`.

        Raises:
            StoreDamagedError: a row is missing, does not decode, or its checksum does not match.
        """
        bytes_out = out.view(np.uint8).reshape(len(rows), self._layout.row_bytes)
        each_in_threads(self._read, list(zip(rows, bytes_out, strict=True)), threads)

    def _read(self, place: tuple[int, NDArray[np.uint8]]) -> None:
        number, slot = divmod(place[0], self._form.rows)
        shard: _Shard = self._shards.get(self, number)
        data = shard.read(slot)
        if self._form.sealed:
            data, found = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
            if self._sealed and checksum(data) != found:
                raise shard.damaged(f"the checksum of its entry {slot} does not match")
        try:
            _decompress(self._form.compressor, data, place[1])
        except (ValueError, RuntimeError, MemoryError, zlib.error) as error:
            raise shard.damaged(f"its entry {slot} does not decode: {error}") from error


class _Shard:
    """One open file and its index."""

    def __init__(self, path: Path, form: RowShards) -> None:
        self._path, self._descriptor = path, -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise StoreDamagedError(f"{path} is missing from the store") from error
        self._size = os.fstat(self._descriptor).st_size
        length = form.rows * INDEX_ENTRY_BYTES + CHECKSUM_BYTES * form.index_sealed
        if self._size < length:  # before reading, so that no document can make us allocate
            raise self.damaged(f"its {self._size} bytes cannot hold an index of {length}")
        start = self._size - length if form.index_at_end else 0
        data = os.pread(self._descriptor, length, start)
        body = data[: form.rows * INDEX_ENTRY_BYTES]
        if form.index_sealed and checksum(body) != data[-CHECKSUM_BYTES:]:
            raise self.damaged("the checksum of its index does not match")
        self._index = np.frombuffer(body, "<u8").reshape(-1, 2)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, slot: int) -> bytes:
        """Return the bytes of a slot.

        Raises:
            StoreDamagedError: the index says that there are none, or points outside the file.
        """
        offset, length = (int(value) for value in self._index[slot])
        if offset == length == EMPTY:  # Zarr would return fill values
            raise self.damaged(f"its entry {slot} was never written")
        if offset + length > self._size:
            raise self.damaged(f"its index places entry {slot} outside the file")
        data = os.pread(self._descriptor, length, offset)
        if len(data) != length:
            raise self.damaged(f"it was cut since it was opened, in front of entry {slot}'s end")
        return data

    def damaged(self, reason: str) -> StoreDamagedError:
        """Return the error for this file."""
        return StoreDamagedError(
            f"{self._path} is damaged: {reason}; another tool than `sak` wrote this array: "
            "write it anew with that tool, or delete it and run `sak extract-teachers` again"
        )


def _decompress(compressor: str | None, data: bytes, row: NDArray[np.uint8]) -> None:
    """Fill the bytes of a row.

    Raises:
        ValueError, RuntimeError, MemoryError, zlib.error: `data` are not those of a row.
    """
    if compressor == "blosc":  # trusts the sizes in its header, and fills as much as these say
        _, size, _, length = np.frombuffer(data[:_BLOSC_HEADER].ljust(_BLOSC_HEADER), "<u4")
        _refuse_size(int(length), len(data))
        _refuse_size(int(size), len(row))
        Blosc().decode(data, out=row)
        return
    if compressor == "gzip":
        stream = zlib.decompressobj(_GZIP)
        values = stream.decompress(data, len(row) + 1)
        if not stream.eof:
            raise ValueError("the compressed data does not end with the row")
    else:
        values = Zstd().decode(data) if compressor == "zstd" else data
    _refuse_size(len(values), len(row))
    row[:] = np.frombuffer(values, np.uint8)


def _refuse_size(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{found} bytes, expected {expected}")
