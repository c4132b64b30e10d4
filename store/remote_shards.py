"""Reads rows of an array's shards on object storage, all rows of one call at the same time."""

import errno
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from store.chunks import checksum
from store.errors import StoreDamagedError
from store.layout import CHECKSUM_BYTES, ArrayLayout
from store.remote import remote_errors
from store.shard import damaged_shard, index_range, read_index

_INDEXES = 4096  # shards whose row offsets are kept, 8 bytes a row


class RemoteShards:
    """The shards of one array; safe to share between threads and across a fork."""

    def __init__(self, folder: UPath, layout: ArrayLayout) -> None:
        self._folder = folder
        self._layout = layout
        self._known: dict[int, NDArray[np.uint64]] = {}

    def open(self, rows: list[int]) -> None:
        """Read the indexes of the shards that hold `rows`.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or its index is damaged.
        """
        self._indexes(sorted({row // self._layout.chunk[0] for row in rows}))

    def read_into(self, rows: list[int], out: NDArray[Any], threads: int) -> None:
        """Fill `out` (n, ...) with the entries of the array at `rows` (n,).

        All are asked for at the same time, whatever `threads` says.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or a checksum does not match.
        """
        places = [divmod(row, self._layout.chunk[0]) for row in rows]
        indexes = self._indexes(sorted({number for number, _ in places}))
        starts = [int(indexes[number][slot]) for number, slot in places]
        length = self._layout.row_bytes + CHECKSUM_BYTES
        records = self._fetch(
            [number for number, _ in places], starts, [start + length for start in starts]
        )
        for (number, slot), record, row in zip(places, records, out, strict=True):
            body = record[:-CHECKSUM_BYTES]
            if len(record) != length or checksum(body) != record[-CHECKSUM_BYTES:]:
                reason = f"the checksum of its entry {slot} does not match"
                raise damaged_shard(self._path(number), reason)
            row[...] = np.frombuffer(body, self._layout.dtype).reshape(row.shape)

    def _indexes(self, numbers: list[int]) -> dict[int, NDArray[np.uint64]]:
        found = {number: self._known[number] for number in numbers if number in self._known}
        new = [number for number in numbers if number not in found]
        ranges = [index_range(self._layout, number) for number in new]
        # One byte more than there should be, so that a file that is too long shows as well.
        starts, ends = [start for start, _ in ranges], [sum(entry) + 1 for entry in ranges]
        for number, data in zip(new, self._fetch(new, starts, ends), strict=True):
            if len(data) != index_range(self._layout, number)[1]:
                self._refuse_size(number)
            found[number] = read_index(self._path(number), self._layout, number, data)
        self._known.update(found)
        for number in list(self._known)[:-_INDEXES]:
            self._known.pop(number, None)
        return found

    def _fetch(self, numbers: list[int], starts: list[int], ends: list[int]) -> list[bytes]:
        if not numbers:
            return []
        paths = [self._path(number).path for number in numbers]
        found = self._folder.fs.cat_ranges(paths, starts, ends, on_error="return")
        for number, data in zip(numbers, found, strict=True):
            if isinstance(data, Exception):
                self._refuse(number, data)
        return list(found)

    def _refuse(self, number: int, error: Exception) -> None:
        path = self._path(number)
        if isinstance(error, FileNotFoundError):
            raise StoreDamagedError(f"{path} is missing from the store") from error
        with remote_errors(path):
            if getattr(error, "errno", None) != errno.EINVAL:  # what a range behind the end gives
                raise error
        self._refuse_size(number)
        raise error

    def _refuse_size(self, number: int) -> None:
        path = self._path(number)
        size, expected = path.stat().st_size, self._layout.file_bytes(number)
        if size != expected:
            raise damaged_shard(path, f"it should have {expected} bytes, it has {size}")

    def _path(self, number: int) -> UPath:
        return self._folder / self._layout.file_path(number)
