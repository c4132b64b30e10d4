"""Writes one teacher's features: whole shards, in any order, resumable after any kind of stop.

Several writers may be open on one teacher, in one process or on several machines: each shard is
written by whoever claims it (`store.locks`), and the last one to be done finishes the teacher.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from store.begun import bytes_to_come
from store.chunks import write_array
from store.codecs import FLOATS, Codec, Codes, FloatCodec, Values
from store.create import create_store
from store.disk import refuse_full_disk
from store.documents import write_document
from store.encode import encode
from store.errors import StoreError, StoreLockedError, StoreMismatchError, UnfinishedStoreError
from store.files import Lock, full_disk_refused, lock_folder, make_folder, remove_partials
from store.locks import FileLock, lock_shard, remove_stale_locks, teacher_turn
from store.pending import PendingShard, merge_shards
from store.remote import StorePath, locate
from store.row_moments import PartMoments
from store.spec import GLOBAL, TeacherSpec
from store.statistics import Moments
from store.stored_codecs import Calibrate, read_codec
from store.tables import read_root
from store.teacher import (
    TeacherRecord,
    begin_teacher,
    missing_shards,
    read_record,
    reopen_admitted,
    write_record,
)
from store.teacher_layout import TeacherLayout
from store.values import check_codes, check_rows

__all__ = ["DEFAULT_SHARD_BYTES", "FeatureWriter", "create_store"]

DEFAULT_SHARD_BYTES = 128 * 2**20

_logger = logging.getLogger(__name__)


class FeatureWriter:
    """A writer of one teacher; use as a context manager, made by `open` or `join`.

    Ask `missing` for the row ranges still to do, `write` each of them, then `finish`. What is
    committed survives anything, what is not is asked for again. Beside other writers `claim` each
    range first; `write` claims what is not, and refuses what another holds.
    """

    def __init__(self, folder: StorePath, record: TeacherRecord, lock: Lock) -> None:
        self._folder = folder
        self._record = record
        self._layout = record.layout
        self._lock = lock
        self._codecs = _codecs(folder, record)
        self._moments = PartMoments(self._layout, self._codecs)
        self._missing: list[int] | None = None  # looked for when it is asked for
        self._claims: dict[int, Lock | FileLock] = {}
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._pending: PendingShard | None = None

    @classmethod
    def open(
        cls,
        path: str | StorePath,
        teacher: TeacherSpec,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        covariance: bool = False,
        calibrate: Calibrate | None = None,
    ) -> "FeatureWriter":
        """Begin or resume a teacher in a store made by `create_store`.

        `shard_bytes` is the mean size of the arrays' shard files; `covariance` gathers the
        covariance of each level's channels too; `calibrate` is called where the teacher's codec
        has to be fitted first. A teacher that is resumed keeps the rows per shard, the covariances
        and the codecs it was begun with.

        Raises:
            StoreLockedError: `gc` or `repair` is at the teacher, or another writer has begun it and
                does not come to an end with that.
            StoreMismatchError: the teacher is there with another specification, or of other images.
            StoreError: there is no store, or no space.
        """
        path = locate(path)
        root = read_root(path)
        asked = TeacherRecord(
            spec=teacher,
            rows=root.rows,
            rows_per_shard=1,
            images_digest=root.images_digest,
            views_digest=root.views_digest,
            finished=False,
            covariance=covariance,
        )
        folder = path / teacher.name
        make_folder(folder)
        lock = lock_folder(folder, shared=True)
        try:
            with full_disk_refused(folder, lambda: "No features were written"):
                make_folder(folder / "commit")
                with teacher_turn(folder):
                    record = begin_teacher(folder, asked, shard_bytes, calibrate)
                    writer = cls(folder, record, lock)
                    if record.finished and writer.missing():
                        writer._set_finished(False)
                    return writer
        except BaseException:
            lock.release()
            raise

    @classmethod
    def join(cls, path: str | StorePath, teacher: TeacherSpec) -> "FeatureWriter":
        """Write to a teacher that `open` has begun; reads its description and changes nothing.

        Raises:
            StoreLockedError: `gc` or `repair` is at the teacher.
            StoreMismatchError: the teacher there has another specification, or other images.
            StoreError: there is no store, or no such teacher in it.
        """
        path = locate(path)
        root, folder = read_root(path), path / teacher.name
        record = read_record(folder)
        if record.spec != teacher or not record.belongs_to(root):
            raise StoreMismatchError(
                f"{folder} was begun with other settings, or other images, than this process has; "
                "use the same parameter file, data and release of sak-distill everywhere"
            )
        return cls(folder, record, lock_folder(folder, shared=True))

    @property
    def rows(self) -> int:
        """Number of rows of the store when the writer was opened."""
        return self._record.rows

    @property
    def images_digest(self) -> str:
        """Digest of the store's images when the writer was opened."""
        return self._record.images_digest

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all arrays as stored, without checksums."""
        return sum(array.row_bytes for array in self._layout.features().values())

    @property
    def layout(self) -> TeacherLayout:
        """Where the teacher's arrays lie, and their extents."""
        return self._layout

    @property
    def codecs(self) -> Mapping[str, Codec]:
        """How each target, and `global`, is stored, by name."""
        return self._codecs

    def missing(self) -> list[range]:
        """Return the row ranges of the shards that nobody has committed yet, in order.

        What was committed when asked before is not looked at again.
        """
        self._missing = missing_shards(self._folder, self._layout, self._missing)
        return [self._layout.shard_rows(shard) for shard in self._missing]

    def claim(self, rows: range) -> bool:
        """Reserve a range given by `missing` for this writer, until written or closed.

        Returns False where another writer is at it, or has committed it.

        Raises:
            StoreError: the teacher was deleted, or grew, since this writer was opened.
        """
        shard = rows.start // self._layout.rows_per_shard
        if shard in self._claims:
            return True
        try:
            lock = lock_shard(self._folder, shard)
        except StoreLockedError:
            return False
        try:
            self._refuse_other_record()
            wanted = bool(missing_shards(self._folder, self._layout, [shard]))
        except BaseException:
            lock.release()
            raise
        if not wanted:
            lock.release()
            return False
        self._claims[shard] = lock
        return True

    def write(
        self,
        rows: range,
        levels: Mapping[str, Values],
        pooled: Values | None,
        valid: NDArray[np.bool_],
    ) -> None:
        """Encode rows, sum up what a reader gets of them, and write them as `write_codes` does.

        Args:
            rows: the rows of this part, all of one shard.
            levels: (n, H, W, C) of each level by name, any float type.
            pooled: (n, C) where the teacher has a pooled output, else None.
            valid: (n,) False where the image is quarantined; such rows are stored as zeros.

        Raises:
            StoreError: rows out of turn, wrong names or shapes, values that are not finite or
                exceed float16, or a full disk. The begun shard is dropped, all others are safe.
        """
        try:
            values = check_rows(self._record.spec, rows, levels, pooled, valid)
            codes = encode(self._layout, self._codecs, values, valid, self._pool)
            targets = [target.name for target in self._layout.spec.targets]
            moments = self._pool.map(lambda name: self._moments(name, codes[name], valid), targets)
            by_target = dict(zip(targets, moments, strict=True))
        except BaseException:
            self._drop()
            raise
        self.write_codes(rows, codes, by_target, valid)

    def write_codes(
        self,
        rows: range,
        codes: Mapping[str, Codes],
        moments: Mapping[str, Iterable[Moments]],
        valid: NDArray[np.bool_],
    ) -> None:
        """Write a range given by `missing`, whole or in consecutive parts.

        The shard is committed with its last part; memory is one part, not one shard.

        Args:
            rows: the rows of this part, all of one shard.
            codes: (n, ...) as stored by `codecs`, of each target and of `global`, by name.
            moments: of the tokens of the valid rows as they will be read, by target name; one entry
                a row, or one for several, in order. `sak verify` computes them anew.
            valid: (n,) False where the image is quarantined; such rows must be zeros.

        Raises:
            StoreError: rows out of turn, wrong names, shapes or types, floats that are not finite,
                moments of other tokens, or a full disk. The begun shard is dropped, all others are
                safe.
        """
        try:
            pending = self._turn(rows)
            check_codes(self._layout, codes, valid, rows)
            with full_disk_refused(self._folder, self._state):
                pending.append(codes, moments, valid)
                if pending.full:
                    self._lock.check()
                    self._claims[pending.shard].check()
                    self._refuse_other_record()
                    pending.commit()
                    self._pending = None
                    self._claims.pop(pending.shard).release()
        except BaseException:
            self._drop()
            raise

    def finish(self) -> None:
        """Merge the statistics of all shards and mark the teacher as finished, if nobody has.

        Raises:
            UnfinishedStoreError: rows are missing.
            StoreError: every row is quarantined, the disk is full, or the teacher was deleted, or
                grew, since this writer was opened.
        """
        self._refuse_missing()
        with teacher_turn(self._folder) as turn:
            self._record = self._refuse_other_record()
            remove_stale_locks(self._folder, self._lock)
            if self._record.finished:
                return
            if read_root(self._folder.parent).earlier:
                # Committed by one who had not seen yet that their images were let in.
                reopen_admitted(self._folder, self._layout)
                self._missing = None
                self._refuse_missing()
            self._lock.check()
            with full_disk_refused(self._folder, lambda: "Every shard is safe"):
                remove_partials(self._folder)
                self._write_statistics()
                turn.check()
                self._set_finished(True)
        _logger.info("finished teacher %s: %d rows", self._record.spec.name, self._record.rows)

    def _refuse_missing(self) -> None:
        if missing := self.missing():
            raise UnfinishedStoreError(
                f"{sum(map(len, missing))} of {self._record.rows} rows of teacher "
                f"{self._record.spec.name!r} are not written yet, from row {missing[0].start} on; "
                "run `sak extract-teachers` again"
            )

    def close(self) -> None:
        """Drop a begun shard and leave what was claimed to others; a second call does nothing."""
        self._drop()
        self._pool.shutdown()
        while self._claims:
            self._claims.popitem()[1].release()
        self._lock.release()

    def __enter__(self) -> "FeatureWriter":  # noqa: PYI034  (beartype cannot check Self here)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _turn(self, rows: range) -> PendingShard:
        """Return the shard that `rows` go to, begun where they are its first."""
        layout = self._layout
        if rows.step != 1 or not 0 <= rows.start < rows.stop <= self._record.rows:
            raise StoreError(f"{rows} are no rows of this store, it has {self._record.rows}")
        shard = rows.start // layout.rows_per_shard
        if self._pending is None and rows.start == layout.shard_rows(shard).start:
            self._claim_or_refuse(rows)
            refuse_full_disk(
                self._folder, self._shard_bytes(shard), self._state, self._others(shard)
            )
            with full_disk_refused(self._folder, self._state):
                self._pending = PendingShard(self._folder, layout, shard, self._pool)
        if self._pending is None or rows.start != self._pending.next_row:
            expected = "the start of a shard" if self._pending is None else self._pending.next_row
            raise StoreError(f"{rows} are out of turn: row {expected} comes next")
        if rows.stop > self._pending.rows.stop:
            raise StoreError(f"{rows} cross the end of a shard, {self._pending.rows}")
        return self._pending

    def _claim_or_refuse(self, rows: range) -> None:
        if not self.claim(rows):
            if missing_shards(
                self._folder, self._layout, [rows.start // self._layout.rows_per_shard]
            ):
                raise StoreLockedError(
                    f"another process is writing {rows} of {self._folder}; wait until it ends, or "
                    "stop it"
                )
            raise StoreError(f"{rows} are written already; ask missing() for what is not")

    def _refuse_other_record(self) -> TeacherRecord:
        """Return the teacher's description as it is now, the same but for its finished mark."""
        record = read_record(self._folder)
        if dataclasses.replace(record, finished=self._record.finished) != self._record:
            raise StoreMismatchError(
                f"{self._folder} was changed by another process (images were added, or it was "
                "deleted and begun anew); run the same command again"
            )
        return record

    def _shard_bytes(self, shard: int) -> int:
        layout = self._layout
        arrays = [*layout.features().values(), *layout.commits(), layout.valid()]
        return sum(array.file_bytes(shard) for array in arrays)

    def _others(self, shard: int) -> int:
        """Return the bytes that other shards still take, of this teacher and of others."""
        if not isinstance(self._folder, Path):
            return 0
        return bytes_to_come(self._folder.parent, self._folder, shard)

    def _state(self) -> str:
        features = self._layout.features().values()
        missing = missing_shards(self._folder, self._layout, self._missing)
        needed = sum(array.file_bytes(shard) for array in features for shard in missing)
        return (
            f"Teacher {self._record.spec.name!r} still needs {needed / 2**20:,.1f} MiB; "
            f"{self._layout.shards - len(missing)} of {self._layout.shards} shards are safe"
        )

    def _write_statistics(self) -> None:
        layout = self._layout
        totals = merge_shards(self._folder, layout)
        for target in layout.spec.targets:
            moments = totals[target.name]
            if moments.count == 0:
                raise StoreError(
                    f"every image of teacher {layout.spec.name!r} is quarantined; nothing to finish"
                )
            statistics = moments.statistics()
            for name, array in layout.statistics(target).items():
                write_array(self._folder, array, np.asarray(getattr(statistics, name)))
        for path, document in layout.statistics_documents().items():
            write_document(self._folder / path, document)

    def _set_finished(self, finished: bool) -> None:
        if self._record.finished != finished:
            self._record = dataclasses.replace(self._record, finished=finished)
            write_record(self._folder, self._record)

    def _drop(self) -> None:
        if self._pending is not None:
            self._pending.discard()
            self._claims.pop(self._pending.shard).release()
            self._pending = None


def _codecs(folder: StorePath, record: TeacherRecord) -> dict[str, Codec]:
    """Return the codec of every array of a teacher, by the names of `features`."""
    floats = FloatCodec(dtype=FLOATS.get(record.spec.codec, "<f2"))
    codecs: dict[str, Codec] = {GLOBAL: floats}
    for target in record.spec.targets:
        stored = record.codecs.get(target.name)
        codecs[target.name] = floats if stored is None else read_codec(folder, target, stored).codec
    return codecs
