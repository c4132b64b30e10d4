"""Reads features by row, only those that were really written, checksums verified."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.chunks import read_array
from store.documents import check_document
from store.errors import StoreDamagedError, StoreError, StoreMismatchError, nearest
from store.layout import METADATA, ArrayLayout
from store.shard import ShardReader
from store.spec import ImageTable, TeacherSpec, ViewTable, canonical_json
from store.statistics import Statistics
from store.tables import read_images, read_root, read_views
from store.teacher import (
    VALID,
    TeacherRecord,
    is_earlier,
    is_teacher,
    read_marks,
    read_record,
    refuse_unusable,
)

_OPEN_SHARDS = 256  # well below the usual limit of 1024 open files


class FeatureStore:
    """A store opened for reading, see `store.spec` for what it holds.

    Opening reads a few small files; images, views and shards are read when first asked for. Safe
    to share between threads and across a fork; pickling carries the path only.

    Raises:
        StoreError: there is no store at the path.
        StoreFormatError: it is no feature store, or of another format version.
        StoreDamagedError: its metadata contradicts its files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._root = read_root(self.path)
        self._records = {
            folder.name: read_record(folder)
            for folder in sorted(self.path.iterdir())
            if is_teacher(folder)
        }
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)
        self._layouts: dict[tuple[str, str], ArrayLayout] = {}
        self._marks: dict[str, NDArray[np.uint8]] = {}

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path]]:
        return type(self), (self.path,)

    @property
    def rows(self) -> int:
        """Number of (image, view) pairs."""
        return self._root.rows

    @cached_property
    def images(self) -> ImageTable:
        """The images, in order."""
        self._refuse_grown()
        return read_images(self.path)

    @cached_property
    def views(self) -> ViewTable:
        """The view of every row."""
        self._refuse_grown()
        return read_views(self.path)

    @cached_property
    def _image_rows(self) -> dict[str, int]:
        views = self._root.views_per_image
        return {name: index * views for index, name in enumerate(self.images.ids)}

    @property
    def teachers(self) -> Mapping[str, TeacherSpec]:
        """The teachers that are finished and of these images and views, by name."""
        return MappingProxyType(
            {
                name: record.spec
                for name, record in self._records.items()
                if record.finished and record.belongs_to(self._root)
            }
        )

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Names of the teachers that were begun, but not extracted for every image yet."""
        return tuple(
            name
            for name, record in self._records.items()
            if not record.finished
            or (not record.belongs_to(self._root) and is_earlier(self.path, record))
        )

    def digest(self, teachers: Sequence[str] | None = None) -> str:
        """Return a SHA-256 in hexadecimal of images, views and teachers (default: all finished).

        Name the teachers that were used, and adding another does not change the digest.
        """
        names = sorted(self.teachers if teachers is None else set(teachers))
        prints = {name: self._record(name).spec.fingerprint() for name in names}
        parts = [self._root.images_digest, self._root.views_digest, prints]
        return sha256(canonical_json(parts).encode()).hexdigest()

    def require(
        self,
        *,
        images_digest: str | None = None,
        views_digest: str | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        """Refuse a store of other images, views or teachers than asked for; None is not compared.

        Raises:
            StoreMismatchError: with what differs and the command that mends it.
            UnfinishedStoreError: a teacher asked for is not finished.
        """
        asked = {"images": images_digest, "views": views_digest}
        stored = {"images": self._root.images_digest, "views": self._root.views_digest}
        lines = [
            f"  {name}: store has digest {stored[name][:12]}, asked for {digest[:12]}"
            for name, digest in asked.items()
            if digest is not None and digest != stored[name]
        ]
        for name, fingerprint in (fingerprints or {}).items():
            spec = self._record(name).spec
            if spec.fingerprint() != fingerprint:
                lines.append(
                    f"  teacher {name!r}: store has fingerprint {spec.fingerprint()[:12]} "
                    f"({canonical_json(dict(spec.provenance)):.400}), asked for {fingerprint[:12]}"
                )
        if lines:
            raise StoreMismatchError(
                f"{self.path} ({self._root.images} images) is not the store asked for:\n"
                + "\n".join(lines)
                + "\nRun `sak extract-teachers` into another store path and use that, "
                "or go back to the data and parameters this store was made with."
            )

    def row(self, image_id: str, view: int = 0) -> int:
        """Return the row of an image's view.

        Raises:
            StoreError: the image is not in the store, or has no such view.
        """
        first = self._image_rows.get(image_id)
        if first is None:
            hint = nearest(image_id, self._image_rows)
            raise StoreError(f"image {image_id!r} is not in {self.path}: {hint}")
        if not 0 <= view < self._root.views_per_image:
            raise StoreError(f"view {view}: the store has {self._root.views_per_image} per image")
        return first + view

    def valid(self, teacher: str) -> NDArray[np.bool_]:
        """Return for each row (rows,) whether the teacher has features; False is quarantined."""
        marks: NDArray[np.uint8] = self._row_marks(teacher)
        return np.equal(marks, VALID)

    def read(
        self, teacher: str, level: str, rows: Sequence[int] | NDArray[np.integer[Any]]
    ) -> NDArray[np.float16]:
        """Return (n, H, W, C) of a level, or (n, C) of `global`, in the order of `rows`.

        Raises:
            StoreError: unknown teacher, level or row, or a row that is quarantined.
            UnfinishedStoreError: the teacher is not finished.
            StoreDamagedError: a checksum does not match.
        """
        layout = self.array(teacher, level)
        wanted = np.asarray(rows, np.int64)
        self._refuse_rows(teacher, wanted)
        out: NDArray[np.float16] | None = None
        for position, row in enumerate(wanted.tolist()):
            number, slot = divmod(row, layout.chunk[0])
            shard = self._shard(teacher, level, number)
            if out is None:  # only now is it known that the file is as large as the metadata says
                out = np.empty((len(wanted), *layout.shape[1:]), "<f2")
            shard.read_into(slot, out[position])
        return np.empty((0, *layout.shape[1:]), "<f2") if out is None else out

    def levels(self, teacher: str) -> tuple[str, ...]:
        """Return the names that `read` knows: the levels, then `global` where there is one."""
        return tuple(self._record(teacher).layout.features())

    def array(self, teacher: str, level: str) -> ArrayLayout:
        """Return where a level's array lies and its extents, its metadata checked.

        Raises:
            StoreError: unknown teacher or level.
            UnfinishedStoreError: the teacher is not finished.
            StoreDamagedError: the metadata is not what the teacher's specification says.
        """
        if (teacher, level) not in self._layouts:
            features = self._record(teacher).layout.features()
            if level not in features:
                hint = nearest(level, features)
                raise StoreError(f"teacher {teacher!r} has no level {level!r}: {hint}")
            layout = features[level]
            with self._growth_told(teacher):
                check_document(self.path / teacher / layout.path / METADATA, layout.document())
            self._layouts[teacher, level] = layout
        return self._layouts[teacher, level]

    def statistics(self, teacher: str, level: str) -> Statistics:
        """Return mean and variance per channel over the tokens of all valid rows.

        Raises:
            StoreError: unknown teacher or level, or `global`, which has none.
        """
        record = self._record(teacher)
        names = [entry.name for entry in record.spec.levels]
        if level not in names:
            raise StoreError(
                f"teacher {teacher!r} has no statistics of {level!r}: {nearest(level, names)}"
            )
        parts = {
            name: read_array(self.path / teacher, layout)
            for name, layout in record.layout.statistics(level).items()
        }
        self._refuse_grown(teacher)  # these files have no rows that would show it
        return Statistics(count=int(parts["count"]), mean=parts["mean"], variance=parts["variance"])

    def _record(self, teacher: str) -> TeacherRecord:
        record = self._records.get(teacher)
        if record is None:
            hint = nearest(teacher, self._records)
            raise StoreError(f"teacher {teacher!r} is not in {self.path}: {hint}")
        refuse_unusable(self.path / teacher, record, self._root)
        return record

    def _open_shard(self, teacher: str, level: str, number: int) -> ShardReader:
        layout = self.array(teacher, level)
        with self._growth_told(teacher):
            return ShardReader(self.path / teacher, layout, number)

    def _row_marks(self, teacher: str) -> NDArray[np.uint8]:
        if teacher not in self._marks:
            layout = self._record(teacher).layout
            with self._growth_told(teacher):
                self._marks[teacher] = read_marks(self.path / teacher, layout)
        return self._marks[teacher]

    @contextmanager
    def _growth_told(self, teacher: str) -> Iterator[None]:
        """Files that another process made longer meanwhile look damaged, but are not."""
        try:
            yield
        except StoreDamagedError:
            self._refuse_grown(teacher)
            raise

    def _refuse_grown(self, teacher: str | None = None) -> None:
        same = read_root(self.path) == self._root
        if teacher is not None:
            same = read_record(self.path / teacher) == self._records[teacher]
        if not same:
            raise StoreMismatchError(
                f"{self.path / (teacher or '')} has changed since it was opened, as it does when "
                "images are added; open it again, after `sak extract-teachers`"
            )

    def _refuse_rows(self, teacher: str, rows: NDArray[np.int64]) -> None:
        outside = rows[(rows < 0) | (rows >= self.rows)]
        if outside.size:
            raise StoreError(f"row {outside[0]} is not in the store, it has {self.rows} rows")
        bad = rows[self._row_marks(teacher)[rows] != VALID]
        if bad.size:
            index = int(bad[0]) // self._root.views_per_image
            raise StoreError(
                f"{bad.size} of {rows.size} rows are quarantined for teacher {teacher!r}, the "
                f"first is row {bad[0]}, image {self.images.ids[index]!r} "
                f"({self.images.statuses[index]}); ask valid() which rows have features"
            )
