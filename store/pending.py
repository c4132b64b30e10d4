"""The shard that is being written: rows arrive in order, nothing shows until it is committed."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from store.chunks import read_chunk, write_chunk
from store.files import remove_file
from store.layout import TeacherLayout
from store.remote import StorePath, each
from store.shard import ShardWriter
from store.statistics import Moments
from store.teacher import QUARANTINED, VALID


class PendingShard:
    """One shard of every feature array of a teacher, under temporary names until `commit`."""

    def __init__(self, folder: StorePath, layout: TeacherLayout, shard: int) -> None:
        self._folder = folder
        self._layout = layout
        self.shard = shard
        self.rows = layout.shard_rows(shard)
        self.next_row = self.rows.start
        self._marks: list[NDArray[np.uint8]] = []
        self._moments = empty_moments(layout)
        # A fresh array per row would cost more in page faults than the sums themselves.
        self._scratch = {
            level.name: np.empty((level.grid[0] * level.grid[1], level.channels))
            for level in layout.spec.levels
        }
        self._products = {
            level.name: np.empty((level.channels, level.channels)) if layout.covariance else None
            for level in layout.spec.levels
        }
        self._writers: dict[str, ShardWriter] = {}
        try:
            for name, array in layout.features().items():
                self._writers[name] = ShardWriter(folder, array, shard)
        except BaseException:
            self.discard()
            raise

    @property
    def full(self) -> bool:
        """Whether every row has arrived."""
        return self.next_row == self.rows.stop

    def append(self, arrays: Mapping[str, NDArray[np.float16]], valid: NDArray[np.bool_]) -> None:
        """Add the next rows: each array (n, ...) by level name, `valid` (n,)."""
        each(self._folder, lambda name: self._writers[name].append(arrays[name]), arrays)
        for name, moments in self._moments.items():
            # Row by row, so that the sums do not depend on how rows were batched.
            for row in np.flatnonzero(valid):
                one = Moments.of(arrays[name][row], self._scratch[name], self._products[name])
                moments = moments.merge(one)
            self._moments[name] = moments
        self._marks.append(np.where(valid, VALID, QUARANTINED).astype(np.uint8))
        self.next_row += len(valid)

    def commit(self) -> None:
        """Make the shard durable, then visible, then committed, in this order."""
        assert self.full
        layout, shard = self._layout, self.shard
        # A damaged shard that is written anew: its old mark must not vouch for new files.
        remove_file(self._folder / layout.valid().file_path(shard))
        digests = [np.frombuffer(writer.seal(), np.uint8) for writer in self._writers.values()]
        each(self._folder, ShardWriter.place, self._writers.values())
        records = [moments.to_record() for moments in self._moments.values()]
        write_chunk(self._folder, layout.digests(), shard, np.stack(digests)[None])
        write_chunk(self._folder, layout.moments(), shard, np.concatenate(records, axis=1)[None])
        if layout.covariance:
            triangles = [moments.to_triangle() for moments in self._moments.values()]
            write_chunk(self._folder, layout.comoments(), shard, np.concatenate(triangles)[None])
        write_chunk(self._folder, layout.valid(), shard, np.concatenate(self._marks))

    def discard(self) -> None:
        """Remove what was written; does nothing once committed."""
        for writer in self._writers.values():
            writer.discard()


def empty_moments(layout: TeacherLayout) -> dict[str, Moments]:
    """Return the moments of no rows by level name."""
    return {
        level.name: Moments.empty(level.channels, layout.covariance) for level in layout.spec.levels
    }


def merge_shards(folder: StorePath, layout: TeacherLayout) -> dict[str, Moments]:
    """Return the moments of each level over all committed shards, in the order of rows."""
    totals = empty_moments(layout)
    arrays = [array for array in layout.commits() if array.path != layout.digests().path]

    def read(shard: int) -> list[NDArray[np.float64]]:
        return [read_chunk(folder, array, shard)[0] for array in arrays]

    for record, *lines in each(folder, read, range(layout.shards)):
        line = lines[0] if lines else None
        start, entry = 0, 0
        for level in layout.spec.levels:
            stop = start + level.channels
            last = entry + level.channels * (level.channels + 1) // 2
            triangle = None if line is None else line[entry:last]
            part = Moments.from_record(record[:, start:stop], triangle)
            totals[level.name] = totals[level.name].merge(part)
            start, entry = stop, last
    return totals
