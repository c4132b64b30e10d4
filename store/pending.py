"""The shard that is being written: rows arrive in order, nothing shows until it is committed."""

from collections.abc import Mapping
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from store.chunks import read_chunk, write_chunk
from store.codecs import Codec, Codes
from store.files import remove_file
from store.layout import ArrayLayout
from store.remote import StorePath, each
from store.shard import ShardWriter
from store.spec import Grid
from store.statistics import Moments
from store.teacher import QUARANTINED, VALID
from store.teacher_layout import TeacherLayout

Done = TypeVar("Done")


class TargetWriter:
    """One shard of one array: writes rows of codes, gathers the moments of what a reader gets.

    Row by row, so that sums do not depend on how rows were batched.
    """

    def __init__(
        self,
        folder: StorePath,
        array: ArrayLayout,
        shard: int,
        codec: Codec,
        grid: Grid | None,
        moments: Moments | None,
    ) -> None:
        self.file = ShardWriter(folder, array, shard)
        self.moments = moments
        self._codec = codec
        # A fresh array per row would cost more in page faults than the sums themselves.
        self._decoded: NDArray[np.float32] | None = None
        self._product: NDArray[np.float64] | None = None
        if moments is not None and grid is not None:
            self._decoded = np.empty((*grid, len(moments.mean)), np.float32)
            if moments.comoment is not None:
                self._product = np.empty_like(moments.comoment)

    def append(self, codes: Codes, valid: NDArray[np.bool_]) -> None:
        """Add rows as they are stored (n, ...); the invalid ones, which are zeros, count nothing."""
        for row, good in zip(codes, valid, strict=True):
            self.file.append(row)
            if good and self.moments is not None and self._decoded is not None:
                self._codec.decode(row, self._decoded)
                self.moments = self.moments.merge(Moments.of(self._decoded, self._product))


class PendingShard:
    """One shard of every feature array of a teacher, under temporary names until `commit`.

    The arrays are worked on at the same time, as many as there are threads in `pool`.
    """

    def __init__(
        self,
        folder: StorePath,
        layout: TeacherLayout,
        shard: int,
        codecs: Mapping[str, Codec],
        pool: Executor,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._pool = pool
        self.shard = shard
        self.rows = layout.shard_rows(shard)
        self.next_row = self.rows.start
        self._marks: list[NDArray[np.uint8]] = []
        grids = {target.name: target.grid for target in layout.spec.targets}
        moments = empty_moments(layout)
        self._writers: dict[str, TargetWriter] = {}
        try:
            for name, array in layout.features().items():
                self._writers[name] = TargetWriter(
                    folder, array, shard, codecs[name], grids.get(name), moments.get(name)
                )
        except BaseException:
            self.discard()
            raise

    @property
    def full(self) -> bool:
        """Whether every row has arrived."""
        return self.next_row == self.rows.stop

    def append(self, codes: Mapping[str, Codes], valid: NDArray[np.bool_]) -> None:
        """Add the next rows: codes (n, ...) by target name and `global`, `valid` (n,)."""

        def write(name: str) -> None:
            self._writers[name].append(codes[name], valid)

        _finished([self._pool.submit(write, name) for name in self._writers])
        self._marks.append(np.where(valid, VALID, QUARANTINED).astype(np.uint8))
        self.next_row += len(valid)

    def commit(self) -> None:
        """Make the shard durable, then visible, then committed, in this order."""
        assert self.full
        layout, shard = self._layout, self.shard
        # A damaged shard that is written anew: its old mark must not vouch for new files.
        remove_file(self._folder / layout.valid().file_path(shard))
        files = [writer.file for writer in self._writers.values()]
        digests = [
            np.frombuffer(seal, np.uint8) for seal in self._pool.map(ShardWriter.seal, files)
        ]
        each(self._folder, ShardWriter.place, files)
        every = [writer.moments for writer in self._writers.values()]
        gathered = [moments for moments in every if moments is not None]
        records = [moments.to_record() for moments in gathered]
        write_chunk(self._folder, layout.digests(), shard, np.stack(digests)[None])
        write_chunk(self._folder, layout.moments(), shard, np.concatenate(records, axis=1)[None])
        if layout.covariance:
            triangles = [moments.to_triangle() for moments in gathered]
            write_chunk(self._folder, layout.comoments(), shard, np.concatenate(triangles)[None])
        write_chunk(self._folder, layout.valid(), shard, np.concatenate(self._marks))

    def discard(self) -> None:
        """Remove what was written; does nothing once committed."""
        for writer in self._writers.values():
            writer.file.discard()


def _finished(futures: list[Future[Done]]) -> list[Done]:
    """Return all results; only then raise what one raised, for files are closed after that."""
    wait(futures)
    return [future.result() for future in futures]


def empty_moments(layout: TeacherLayout) -> dict[str, Moments]:
    """Return the moments of no rows by target name."""
    return {
        target.name: Moments.empty(target.channels, layout.covariance)
        for target in layout.spec.targets
    }


def merge_shards(folder: StorePath, layout: TeacherLayout) -> dict[str, Moments]:
    """Return the moments of each target over all committed shards, in the order of rows."""
    totals = empty_moments(layout)
    arrays = [array for array in layout.commits() if array.path != layout.digests().path]

    def read(shard: int) -> list[NDArray[np.float64]]:
        return [read_chunk(folder, array, shard)[0] for array in arrays]

    for record, *lines in each(folder, read, range(layout.shards)):
        for name, part in split_record(layout, record, *lines).items():
            totals[name] = totals[name].merge(part)
    return totals


def split_record(
    layout: TeacherLayout, record: NDArray[np.float64], line: NDArray[np.float64] | None = None
) -> dict[str, Moments]:
    """Return the moments of each target from one shard's entries of `commits`, digests aside."""
    parts = {}
    start, entry = 0, 0
    for target in layout.spec.targets:
        stop = start + target.channels
        last = entry + target.channels * (target.channels + 1) // 2
        triangle = None if line is None else line[entry:last]
        parts[target.name] = Moments.from_record(record[:, start:stop], triangle)
        start, entry = stop, last
    return parts
