"""The shard that is being written: rows arrive in order, nothing shows until it is committed."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from store.chunks import read_chunk, write_chunk
from store.codecs import Codes
from store.errors import StoreError
from store.files import remove_file
from store.layout import ArrayLayout
from store.remote import StorePath, each
from store.shard import ShardWriter
from store.statistics import Moments
from store.teacher import QUARANTINED, VALID
from store.teacher_layout import TeacherLayout
from store.values import check_finite, check_moments

Done = TypeVar("Done")


class TargetWriter:
    """One shard of one array: writes rows of codes, merges the moments of what a reader gets."""

    def __init__(
        self, folder: StorePath, array: ArrayLayout, shard: int, moments: Moments | None
    ) -> None:
        self._path = folder / array.path
        self.file = ShardWriter(folder, array, shard)
        self.moments = moments

    def append(self, codes: Codes, moments: Iterable[Moments], tokens: int) -> None:
        """Add rows as they are stored (n, ...), and the moments of the valid ones, in order.

        Raises:
            StoreError: these are of another number of tokens, or cannot be moments.
        """
        self.file.append(codes)
        if self.moments is None:
            return
        before = self.moments.count
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
            for one in moments:
                check_moments(self._path, one, self.moments)
                self.moments = self.moments.merge(one)
        check_finite(self._path, self.moments)
        if self.moments.count - before != tokens:
            raise StoreError(
                f"{self._path}: moments of {self.moments.count - before} tokens were given, the "
                f"valid rows have {tokens}"
            )


class PendingShard:
    """One shard of every feature array of a teacher, under temporary names until `commit`.

    The arrays are worked on at the same time, as many as there are threads in `pool`.
    """

    def __init__(
        self,
        folder: StorePath,
        layout: TeacherLayout,
        shard: int,
        pool: Executor,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._pool = pool
        self.shard = shard
        self.rows = layout.shard_rows(shard)
        self.next_row = self.rows.start
        self._marks: list[NDArray[np.uint8]] = []
        self._tokens = {
            target.name: target.grid[0] * target.grid[1] for target in layout.spec.targets
        }
        moments = empty_moments(layout)
        self._writers: dict[str, TargetWriter] = {}
        try:
            for name, array in layout.features().items():
                self._writers[name] = TargetWriter(folder, array, shard, moments.get(name))
        except BaseException:
            self.discard()
            raise

    @property
    def full(self) -> bool:
        """Whether every row has arrived."""
        return self.next_row == self.rows.stop

    def append(
        self,
        codes: Mapping[str, Codes],
        moments: Mapping[str, Iterable[Moments]],
        valid: NDArray[np.bool_],
    ) -> None:
        """Add the next rows: codes (n, ...) by target name and `global`, `valid` (n,).

        `moments` are of the valid rows in order, by target name.
        """

        def write(name: str) -> None:
            tokens = int(valid.sum()) * self._tokens.get(name, 0)
            self._writers[name].append(codes[name], moments.get(name, ()), tokens)

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
