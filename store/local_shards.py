"""Reads rows of an array's shards in a folder, into buffers that the caller owns."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from store.layout import ArrayLayout
from store.shard import ShardReader

Verify = Literal["once", "always", "never"]
"""When a row's checksum is compared, see `store.reader.FeatureStore`."""

_OPEN_SHARDS = 192
"""Of a store at a time. Each has two open files, its own and its map's; 1024 are the usual limit."""


class OpenShards:
    """The shards of a store read last; one not read for long is closed once nobody reads it."""

    def __init__(self) -> None:
        self.get: Callable[[LocalShards, int], ShardReader]
        self.get = lru_cache(maxsize=_OPEN_SHARDS)(_open)


class LocalShards:
    """The shards of one array; safe to share between threads and across a fork."""

    def __init__(
        self, folder: Path, layout: ArrayLayout, shards: OpenShards, verify: Verify
    ) -> None:
        self.folder = folder
        self.layout = layout
        self._shards = shards
        self._verify = verify

    def open(self, rows: NDArray[np.int64]) -> None:
        """Open the shards that hold `rows` and have the system fetch these from disk meanwhile.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or its index is damaged.
        """
        for number, (slots, _) in self._by_shard(rows).items():
            self._shards.get(self, number).announce(slots)

    def read_into(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Fill `out` (n, ...) with the entries of the array at `rows` (n,), shard by shard.

        Raises:
            StoreDamagedError: a shard is missing, has another size, or a checksum does not match.
        """
        bytes_out = out.view(np.uint8).reshape(len(rows), self.layout.row_bytes)
        for number, (slots, positions) in self._by_shard(rows).items():
            self._copy(self._shards.get(self, number), slots, bytes_out, positions)

    def _copy(
        self, shard: ShardReader, slots: list[int], out: NDArray[np.uint8], positions: list[int]
    ) -> None:
        shard.refuse_cut()
        for slot, position in zip(slots, positions, strict=True):
            if self._verify == "always" or not (self._verify == "never" or shard.checked[slot]):
                shard.read_into(slot, out[position])
            else:
                shard.copy_into(slot, out[position])

    def _by_shard(self, rows: NDArray[np.int64]) -> dict[int, tuple[list[int], list[int]]]:
        """Return by shard the slots as they lie, and where in `out` each goes."""
        wanted, length = rows.tolist(), self.layout.chunk[0]
        places: dict[int, tuple[list[int], list[int]]] = {}
        for position in sorted(range(len(wanted)), key=wanted.__getitem__):
            number, slot = divmod(wanted[position], length)
            slots, positions = places.setdefault(number, ([], []))
            slots.append(slot)
            positions.append(position)
        return places


def _open(shards: LocalShards, number: int) -> ShardReader:
    return ShardReader(shards.folder, shards.layout, number)
