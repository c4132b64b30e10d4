"""One shard file in Zarr v3's `sharding_indexed` layout, written as a stream, read row by row.

    row 0, crc32c | row 1, crc32c | ... | index: (offset, bytes) uint64 per slot | crc32c

Slots of the index beyond the last row of a short shard hold 2**64 - 1, Zarr's mark of "empty".

A file's digest is the SHA-256 of its array and number and of its checksums: those of the rows in
order, then the index and its own. With rows that match their checksums it says which file this is,
and it costs no second pass over the rows: a SHA-256 of all bytes took two thirds of the time of
writing them. It is proof against accidents, not against somebody who forges rows to fit a crc32c.
"""

import hashlib
import os
from collections.abc import Iterable
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.chunks import checksum
from store.errors import StoreDamagedError
from store.layout import CHECKSUM_BYTES, INDEX_ENTRY_BYTES, ArrayLayout
from store.remote import StorePath
from store.streams import new_file

_CACHED_BYTES = 2**19
"""Written by one call: what a checksum has just been taken of, many rows where these are small."""
EMPTY = int(np.iinfo(np.uint64).max)
"""Zarr's mark, as offset and as length, of a slot that holds nothing."""


class ShardWriter:
    """Writes one shard that nobody sees until placed; memory does not grow with its size."""

    def __init__(self, folder: StorePath, layout: ArrayLayout, number: int) -> None:
        self._slots = layout.chunk[0]
        self._record_bytes = layout.row_bytes + CHECKSUM_BYTES
        self._rows = 0
        self._hash = _digest_of(layout, number)
        self._file = new_file(folder / layout.file_path(number))

    def append(self, rows: NDArray[Any]) -> None:
        """Write rows (n, ...) behind those already written."""
        data = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
        step = max(1, _CACHED_BYTES // self._record_bytes)
        for start in range(0, len(data), step):
            records: list[bytes | memoryview] = []
            for row in data[start : start + step]:
                crc = checksum(row)
                self._hash.update(crc)
                records += (row.data, crc)
            self._file.write(*records)
        self._rows += len(rows)

    def seal(self) -> bytes:
        """Write the index, make the file durable and return its digest."""
        index = np.full((self._slots, 2), EMPTY, "<u8")
        index[: self._rows, 0] = np.arange(self._rows, dtype="<u8") * self._record_bytes
        index[: self._rows, 1] = self._record_bytes
        data = index.tobytes()
        data += checksum(data)
        self._file.write(data)
        self._hash.update(data)
        self._file.sync()
        return self._hash.digest()

    def place(self) -> None:
        """Give the sealed file its final name."""
        self._file.place()

    def discard(self) -> None:
        """Remove what was written; does nothing once placed."""
        self._file.discard()


class ShardReader:
    """Reads rows of one shard file; safe to share between threads and across a fork.

    `copy` is read instead where the file itself is on object storage.

    Raises:
        StoreDamagedError: the file is missing, has another size, or its index is damaged.
    """

    def __init__(
        self, folder: StorePath, layout: ArrayLayout, number: int, copy: Path | None = None
    ) -> None:
        self._path = folder / layout.file_path(number)
        self._descriptor = -1
        self._layout, self._number = layout, number
        self._record_bytes = layout.row_bytes + CHECKSUM_BYTES
        try:
            self._descriptor = os.open(str(copy or self._path), os.O_RDONLY)
        except FileNotFoundError as error:
            raise StoreDamagedError(f"{self._path} is missing from the store") from error
        size, expected = os.fstat(self._descriptor).st_size, layout.file_bytes(number)
        if size != expected:  # before reading, so that no document can make us allocate
            raise damaged_shard(self._path, f"it should have {expected} bytes, it has {size}")
        start, length = index_range(layout, number)
        self._index = os.pread(self._descriptor, length, start)
        self._offsets = read_index(self._path, layout, number, self._index)
        self._size = size
        self.checked = np.zeros(len(self._offsets), bool)
        """Which slots `read_into` has found sound since this file was opened."""

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_into(self, slot: int, row: NDArray[Any]) -> None:
        """Fill `row` (one entry of the array, contiguous) from a slot of the shard.

        Raises:
            StoreDamagedError: the row's checksum does not match.
        """
        found = bytearray(CHECKSUM_BYTES)
        count = os.preadv(self._descriptor, [row.data, found], int(self._offsets[slot]))
        if count != self._record_bytes or checksum(row) != found:
            raise damaged_shard(self._path, f"the checksum of its entry {slot} does not match")
        self.checked[slot] = True

    def announce(self, slots: Iterable[int]) -> None:
        """Tell the system which slots are read next, so that it fetches them from disk at once.

        Those whose last byte is in memory are taken to be there: asking costs an eighth of telling.
        """
        for slot in slots:
            start = int(self._offsets[slot])
            if not self._in_memory(start + self._record_bytes - 1):
                length = self._record_bytes
                os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def _in_memory(self, position: int) -> bool:
        """Whether a byte can be read without waiting; False where the system cannot tell."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            return os.preadv(self._descriptor, [bytearray(1)], position, os.RWF_NOWAIT) == 1
        except OSError:  # not in memory, or a file system that does not know the question
            return False

    def refuse_cut(self) -> None:
        """Refuse a file that was cut or made longer since it was opened; call before `copy_into`.

        Raises:
            StoreDamagedError: it has another size.
        """
        size = os.fstat(self._descriptor).st_size
        if size != self._size:
            reason = f"it had {self._size} bytes when it was opened, it has {size}"
            raise damaged_shard(self._path, reason)

    def copy_into(self, slot: int, row: NDArray[np.uint8]) -> None:
        """Fill the bytes of a row from a slot, at the speed of memory, its checksum not compared.

        The file is mapped: where it is cut short, or its disk fails, in the middle of this call,
        the process ends with SIGBUS.
        """
        start = int(self._offsets[slot])
        row[:] = self._bytes[start : start + len(row)]

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        # Unmapped with the last array that refers to it, so never while a thread copies from it.
        return np.frombuffer(mmap(self._descriptor, self._size, access=ACCESS_READ), np.uint8)

    def digest(self) -> bytes:
        """Return the file's digest; it vouches for the rows that match their checksums."""
        state = _digest_of(self._layout, self._number)
        for offset in self._offsets.tolist():
            end = offset + self._record_bytes
            state.update(os.pread(self._descriptor, CHECKSUM_BYTES, end - CHECKSUM_BYTES))
        state.update(self._index)
        return state.digest()


def _digest_of(layout: ArrayLayout, number: int) -> "hashlib._Hash":
    """Begin a digest with what the file is to be, so that none can stand for another."""
    return hashlib.sha256(f"{layout.path} {number}".encode())


def index_range(layout: ArrayLayout, number: int) -> tuple[int, int]:
    """Return where the index of a shard begins and how long it is, its checksum included."""
    length = layout.chunk[0] * INDEX_ENTRY_BYTES + CHECKSUM_BYTES
    return layout.file_bytes(number) - length, length


def read_index(
    path: StorePath, layout: ArrayLayout, number: int, data: bytes
) -> NDArray[np.uint64]:
    """Return the offset of each row of a shard, from the bytes of its index.

    Raises:
        StoreDamagedError: the index is damaged.
    """
    start, length = index_range(layout, number)
    record_bytes = layout.row_bytes + CHECKSUM_BYTES
    if len(data) != length or checksum(data[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]:
        raise damaged_shard(path, "the checksum of its index does not match")
    index = np.frombuffer(data[:-CHECKSUM_BYTES], "<u8").reshape(-1, 2)[: layout.file_rows(number)]
    if np.any(index[:, 1] != record_bytes) or np.any(index[:, 0] > start - record_bytes):
        raise damaged_shard(path, "its index points outside the rows")
    return index[:, 0]


def damaged_shard(path: StorePath, reason: str) -> StoreDamagedError:
    """Return the error for a shard file that cannot be trusted."""
    return StoreDamagedError(
        f"{path} is damaged: {reason}; delete this file and run "
        "`sak extract-teachers` again, which computes only this shard anew"
    )
