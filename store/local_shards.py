"""Reads rows of an array's shards in a folder, into buffers that the caller owns."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from store.layout import ArrayLayout
from store.shard import ShardReader
from store.threads import each_in_threads

Verify = Literal["once", "always", "never"]
"""When a row's checksum is compared, see `store.reader.FeatureStore`."""

_OPEN_SHARDS = 192
"""Of a store at a time. Each has two open files, its own and its map's; 1024 are the usual limit."""

_SHARED_BYTES = 4 * 2**20
"""Copied by one call, from which on threads share it: waking one costs about as much as 0.5 MB."""


class OpenShards:
    """The shards of a store read last; one not read for long is closed once nobody reads it."""

    def __init__(self) -> None:
        # Of an array (`LocalShards`, `CompressedShards`) and a number, what its `open_shard` gives.
        self.get: Callable[[Any, int], Any]
        self.get = lru_cache(maxsize=_OPEN_SHARDS)(lambda array, number: array.open_shard(number))


class LocalShards:
    """The shards of one array; safe to share between threads and across a fork."""

    def __init__(
        self, folder: Path, layout: ArrayLayout, shards: OpenShards, verify: Verify
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._shards = shards
        self._verify = verify

    def open(self, rows: list[int]) -> None:
        """Open the shards that hold `rows` and have the system fetch these from disk meanwhile.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or its index is damaged.
        """
        for number, (slots, _) in self._by_shard(rows).items():
            self._shards.get(self, number).announce(slots)

    def open_shard(self, number: int) -> ShardReader:
        """Return a shard that was not open."""
        return ShardReader(self._folder, self._layout, number)

    def read_into(self, rows: list[int], out: NDArray[Any], threads: int) -> None:
        """Fill `out` (n, ...) with the entries of the array at `rows` (n,), shard by shard.

        Up to `threads` share the work where it is worth that.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or a checksum does not match.
        """
        bytes_out = out.view(np.uint8).reshape(len(rows), self._layout.row_bytes)
        copies: list[tuple[ShardReader, int, NDArray[np.uint8]]] = []
        for number, (slots, positions) in self._by_shard(rows).items():
            shard: ShardReader = self._shards.get(self, number)
            shard.refuse_cut()
            copies += [
                (shard, slot, bytes_out[position])
                for slot, position in zip(slots, positions, strict=True)
            ]
        each_in_threads(self._copy, copies, threads if out.nbytes >= _SHARED_BYTES else 1)

    def _copy(self, copy: tuple[ShardReader, int, NDArray[np.uint8]]) -> None:
        shard, slot, row = copy
        if self._verify == "always" or not (self._verify == "never" or shard.checked[slot]):
            shard.read_into(slot, row)
        else:
            shard.copy_into(slot, row)

    def _by_shard(self, rows: list[int]) -> dict[int, tuple[list[int], list[int]]]:
        """Return by shard the slots as they lie, and where in `out` each goes."""
        length = self._layout.chunk[0]
        places: dict[int, tuple[list[int], list[int]]] = {}
        for position in sorted(range(len(rows)), key=rows.__getitem__):
            number, slot = divmod(rows[position], length)
            slots, positions = places.setdefault(number, ([], []))
            slots.append(slot)
            positions.append(position)
        return places
