"""One shard file in Zarr v3's `sharding_indexed` layout, written as a stream, read row by row.

    row 0, crc32c | row 1, crc32c | ... | index: (offset, bytes) uint64 per slot | crc32c

Slots of the index beyond the last row of a short shard hold 2**64 - 1, Zarr's mark of "empty".
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from store.chunks import checksum
from store.errors import StoreDamagedError
from store.files import partial_path, sync_folder, write_fully
from store.layout import CHECKSUM_BYTES, INDEX_ENTRY_BYTES, ArrayLayout

_EMPTY = np.iinfo(np.uint64).max


class ShardWriter:
    """Writes one shard under a temporary name; memory is one batch, whatever the shard's size."""

    def __init__(self, folder: Path, layout: ArrayLayout, number: int) -> None:
        self._path = folder / layout.file_path(number)
        self._slots = layout.chunk[0]
        self._record_bytes = layout.row_bytes + CHECKSUM_BYTES
        self._rows = 0
        self._hash = hashlib.sha256()
        self._partial = partial_path(self._path)
        self._descriptor: int | None = os.open(
            self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666
        )

    def append(self, values: NDArray[np.float16]) -> None:
        """Write rows (n, ...) behind those already written."""
        records = np.empty((len(values), self._record_bytes), np.uint8)
        records[:, :-CHECKSUM_BYTES] = values.reshape(len(values), -1).view(np.uint8)
        for record in records:
            crc = checksum(record[:-CHECKSUM_BYTES])
            record[-CHECKSUM_BYTES:] = np.frombuffer(crc, np.uint8)
        self._write(records.data.cast("B") if len(records) else b"")
        self._rows += len(values)

    def seal(self) -> bytes:
        """Write the index, make the file durable and return its SHA-256."""
        index = np.full((self._slots, 2), _EMPTY, "<u8")
        index[: self._rows, 0] = np.arange(self._rows, dtype="<u8") * self._record_bytes
        index[: self._rows, 1] = self._record_bytes
        data = index.tobytes()
        self._write(data + checksum(data))
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        self._close()
        return self._hash.digest()

    def place(self) -> None:
        """Give the sealed file its final name."""
        self._partial.replace(self._path)
        sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove the temporary file; does nothing once placed."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview) -> None:
        assert self._descriptor is not None
        write_fully(self._descriptor, data)
        self._hash.update(data)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class ShardReader:
    """Reads rows of one shard file; safe to share between threads and across a fork.

    Raises:
        StoreDamagedError: the file is missing, has another size, or its index is damaged.
    """

    def __init__(self, folder: Path, layout: ArrayLayout, number: int) -> None:
        self._path = folder / layout.file_path(number)
        self._descriptor = -1
        self._record_bytes = layout.row_bytes + CHECKSUM_BYTES
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise StoreDamagedError(f"{self._path} is missing from the store") from error
        size, expected = os.fstat(self._descriptor).st_size, layout.file_bytes(number)
        if size != expected:  # before reading, so that no document can make us allocate
            raise self._damaged(f"it should have {expected} bytes, it has {size}")
        self._offsets = self._read_index(layout.chunk[0], layout.file_rows(number), size)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_into(self, slot: int, row: NDArray[np.float16]) -> None:
        """Fill `row` (one entry of the array, contiguous) from a slot of the shard.

        Raises:
            StoreDamagedError: the row's checksum does not match.
        """
        found = bytearray(CHECKSUM_BYTES)
        count = os.preadv(self._descriptor, [row.data, found], int(self._offsets[slot]))
        if count != self._record_bytes or checksum(row) != found:
            raise self._damaged(f"the checksum of its entry {slot} does not match")

    def _read_index(self, slots: int, rows: int, size: int) -> NDArray[np.uint64]:
        length = slots * INDEX_ENTRY_BYTES
        start = size - length - CHECKSUM_BYTES
        data = os.pread(self._descriptor, length + CHECKSUM_BYTES, start)
        if checksum(data[:length]) != data[length:]:
            raise self._damaged("the checksum of its index does not match")
        index = np.frombuffer(data, "<u8", count=2 * slots).reshape(slots, 2)[:rows]
        if np.any(index[:, 1] != self._record_bytes) or np.any(
            index[:, 0] > start - self._record_bytes
        ):
            raise self._damaged("its index points outside the rows")
        return index[:, 0]

    def _damaged(self, reason: str) -> StoreDamagedError:
        return StoreDamagedError(
            f"{self._path} is damaged: {reason}; delete this file and run "
            "`sak extract-teachers` again, which computes only this shard anew"
        )
