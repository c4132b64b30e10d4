"""Reads features by row, only those that were really written, checksums verified."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from store.calibration import FittedTarget
from store.chunks import read_array
from store.codecs import Codes, FloatCodec, Values
from store.decode import decode_portions
from store.equivariance import Equivariance, read_equivariance
from store.errors import StoreError, StoreMismatchError, nearest
from store.growth import growth_told, refuse_grown
from store.images import ImageTable, ViewTable
from store.layout import ArrayLayout
from store.local_shards import Verify
from store.remote import StorePath, locate
from store.spec import Grid, TeacherSpec, canonical_json
from store.statistics import Statistics
from store.stored_codecs import read_codec
from store.stored_rows import StoredRows, refuse_buffer
from store.tables import read_images, read_root, read_views
from store.targets import find_array, find_level, level_names, value_shape
from store.teacher import (
    VALID,
    TeacherRecord,
    is_earlier,
    read_marks,
    read_record,
    refuse_unusable,
    teacher_folders,
)
from store.threads import usual_threads

Rows = Sequence[int] | NDArray[np.integer[Any]]


class FeatureStore:
    """A store opened for reading, see `store.spec` for what it holds.

    Opening reads a few small files; images, views and shards are read when first asked for. Safe
    to share between threads and across a fork; pickling carries the path and `verify` only.

    `verify` says when the checksum of a row is compared: "once", at the row's first read after its
    shard was opened; "always"; or "never", for a store that `sak verify` has just passed. A shard
    stays open until many others were read. Rows that are not verified are copied out of a mapped
    file: a shard that is deleted or replaced meanwhile is read on as it was, one found to have
    another size is refused, and one cut short in the middle of a copy, or whose disk fails then,
    ends the process with SIGBUS. `sak` never does that to a file: it writes a new one and renames
    it. On object storage every read is verified.

    Raises:
        StoreError: there is no store at the path, or `verify` is no such word.
        StoreFormatError: it is no feature store, or of another format version.
        StoreDamagedError: its metadata contradicts its files.
    """

    def __init__(self, path: str | StorePath, verify: Verify = "once") -> None:
        if verify not in get_args(Verify):
            raise StoreError(f"verify is {verify!r}, it must be one of {get_args(Verify)}")
        self.path = locate(path)
        self._verify: Verify = verify
        self._root = read_root(self.path)
        self._folders = {folder.name: folder for folder in teacher_folders(self.path)}
        self._records = {name: read_record(folder) for name, folder in self._folders.items()}
        self._rows = StoredRows(self.path, verify)
        self._layouts: dict[tuple[str, str, Grid | None], ArrayLayout] = {}
        self._codecs: dict[tuple[str, str], FittedTarget | None] = {}
        self._marks: dict[str, bytes] = {}

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[StorePath, Verify]]:
        return type(self), (self.path, self._verify)

    @property
    def rows(self) -> int:
        """Number of (image, view) pairs."""
        return self._root.rows

    @cached_property
    def images(self) -> ImageTable:
        """The images, in order."""
        with growth_told(self.path, self._root):
            images = read_images(self.path)
        refuse_grown(self.path, self._root)  # sound tables may be those of now
        return images

    @cached_property
    def views(self) -> ViewTable:
        """The view of every row."""
        with growth_told(self.path, self._root):
            views = read_views(self.path)
        refuse_grown(self.path, self._root)
        return views

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
        records = {name: self._record(name) for name in names}
        prints = {name: record.spec.fingerprint() for name, record in records.items()}
        codecs = {
            name: {target: stored.digest for target, stored in record.codecs.items()}
            for name, record in records.items()
        }
        parts = [self._root.images_digest, self._root.views_digest, prints, codecs]
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
        return np.equal(np.frombuffer(self._row_marks(teacher), np.uint8), VALID)

    def read(
        self,
        teacher: str,
        level: str,
        rows: Rows,
        resolution: Grid | None = None,
    ) -> Values:
        """Return (n, H, W, C) of a level, or (n, C) of `global`, in the order of `rows`.

        `resolution` is one of `grids`, the finest where left out. float16 where floats are stored
        as such, otherwise decoded to float32.

        Raises:
            StoreError: unknown teacher, level, resolution or row, or a row that is quarantined.
            UnfinishedStoreError: the teacher is not finished.
            StoreDamagedError: a checksum does not match.
        """
        layout = self.array(teacher, level, resolution)
        if self.codec(teacher, level, resolution) is None:
            return self.read_codes(teacher, level, rows, resolution)
        wanted = self._ready_rows(teacher, layout, rows)
        shape = value_shape(self._record(teacher).spec, level, resolution)
        out = np.empty((len(wanted), *shape), np.float32)
        self.read_into(teacher, level, wanted, out, resolution)
        return out

    def read_into(
        self,
        teacher: str,
        level: str,
        rows: Rows,
        out: NDArray[np.float32],
        resolution: Grid | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        """Fill `out` (n, H, W, C) or (n, C), float32 and contiguous, with features of `rows`.

        `threads` read and decode side by side, see `usual_threads` for None.

        Raises:
            StoreError: `out` has another shape or type; otherwise see `read`. What `out` holds then
                is not defined.
        """
        layout = self.array(teacher, level, resolution)
        fitted = self.codec(teacher, level, resolution)
        codec = FloatCodec(dtype=layout.dtype) if fitted is None else fitted.codec
        shape = value_shape(self._record(teacher).spec, level, resolution)
        refuse_buffer(out, (len(rows), *shape), "<f4")
        wanted = self._ready_rows(teacher, layout, rows)
        decode_portions(
            lambda part: self._codes(teacher, layout, wanted[part], 1),
            codec,
            out,
            self._rows.portion(layout, len(wanted)),
            threads or usual_threads(),
        )

    def read_codes(
        self, teacher: str, level: str, rows: Rows, resolution: Grid | None = None
    ) -> Codes:
        """Return what is stored of `rows`, which `codec` decodes; see `read`."""
        layout = self.array(teacher, level, resolution)
        wanted = self._ready_rows(teacher, layout, rows)
        return self._codes(teacher, layout, wanted, usual_threads())

    def read_codes_into(
        self,
        teacher: str,
        level: str,
        rows: Rows,
        out: Codes,
        resolution: Grid | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        """Fill `out`, of the type and shape that `read_codes` returns and contiguous.

        The fastest way to read: each row is copied once, from the file into `out`, by `threads`
        where there is much to copy, see `usual_threads` for None.

        Raises:
            StoreError: `out` has another shape or type; otherwise see `read`. What `out` holds then
                is not defined.
        """
        layout = self.array(teacher, level, resolution)
        refuse_buffer(out, (len(rows), *layout.shape[1:]), layout.dtype)
        wanted = self._ready_rows(teacher, layout, rows)
        with growth_told(self._folders[teacher], self._records[teacher]):
            self._rows.read_into(teacher, layout, wanted, out, threads or usual_threads())

    def levels(self, teacher: str) -> tuple[str, ...]:
        """Return the names that `read` knows: the levels, then `global` where there is one."""
        return level_names(self._record(teacher).spec)

    def grids(self, teacher: str, level: str) -> tuple[Grid, ...]:
        """Return the grids (H, W) that a level is stored at, finest first.

        Raises:
            StoreError: unknown teacher or level, or `global`, which has none.
        """
        return find_level(self._record(teacher).spec, level).stored

    def codec(
        self, teacher: str, level: str, resolution: Grid | None = None
    ) -> FittedTarget | None:
        """Return what decodes `read_codes` and what it loses, None where floats are stored.

        Raises:
            StoreError: see `read`.
            StoreDamagedError: its arrays are not those written with the teacher.
        """
        record = self._record(teacher)
        name = find_array(record.spec, level, resolution)
        if (teacher, name) not in self._codecs:
            target = next((one for one in record.spec.targets if one.name == name), None)
            stored = record.codecs.get(name)
            self._codecs[teacher, name] = (
                None
                if stored is None or target is None
                else read_codec(self.path / teacher, target, stored)
            )
        return self._codecs[teacher, name]

    def array(self, teacher: str, level: str, resolution: Grid | None = None) -> ArrayLayout:
        """Return where a level's array lies and its extents, its metadata checked.

        Raises:
            StoreError: unknown teacher, level or resolution.
            UnfinishedStoreError: the teacher is not finished.
            StoreDamagedError: the metadata is not what the teacher's specification says.
        """
        key = teacher, level, resolution
        if key not in self._layouts:
            record = self._record(teacher)
            layout = record.layout.features()[find_array(record.spec, level, resolution)]
            with growth_told(self._folders[teacher], record):
                self._rows.add(teacher, layout)
            self._layouts[key] = layout
        return self._layouts[key]

    def statistics(self, teacher: str, level: str, resolution: Grid | None = None) -> Statistics:
        """Return mean and variance per channel over the tokens of all valid rows, as read.

        The covariance of the channels comes with them where the teacher was extracted with it.

        Raises:
            StoreError: unknown teacher, level or resolution, or `global`, which has none.
        """
        record = self._record(teacher)
        targets = find_level(record.spec, level).targets
        name = find_array(record.spec, level, resolution)
        target = next(one for one in targets if one.name == name)
        parts = {
            key: read_array(self.path / teacher, layout)
            for key, layout in record.layout.statistics(target).items()
        }
        refuse_grown(self.path / teacher, record)  # these files have no rows that would show it
        return Statistics(
            count=int(parts["count"]),
            mean=parts["mean"],
            variance=parts["variance"],
            covariance=parts.get("covariance"),
        )

    def equivariance(self, teacher: str) -> Equivariance | None:
        """Return how far a teacher's levels follow flips, crops and scale, None if not measured.

        Raises:
            StoreError: unknown teacher.
            StoreDamagedError: the figures are not those that were written.
        """
        return read_equivariance(self.path / teacher, self._record(teacher).spec)

    def _record(self, teacher: str) -> TeacherRecord:
        record = self._records.get(teacher)
        if record is None:
            hint = nearest(teacher, self._records)
            raise StoreError(f"teacher {teacher!r} is not in {self.path}: {hint}")
        refuse_unusable(self.path / teacher, record, self._root)
        return record

    def _row_marks(self, teacher: str) -> bytes:
        if teacher not in self._marks:
            record = self._record(teacher)
            with growth_told(self.path / teacher, record):
                self._marks[teacher] = read_marks(self.path / teacher, record.layout).tobytes()
        return self._marks[teacher]

    def _codes(self, teacher: str, layout: ArrayLayout, rows: list[int], threads: int) -> Codes:
        out = np.empty((len(rows), *layout.shape[1:]), layout.dtype)
        with growth_told(self._folders[teacher], self._records[teacher]):
            self._rows.read_into(teacher, layout, rows, out, threads)
        return out

    def _ready_rows(self, teacher: str, layout: ArrayLayout, rows: Rows) -> list[int]:
        """Check `rows` and open their shards, which then are known to be as large as `layout`."""
        wanted: list[int] = np.asarray(rows, np.int64).tolist()
        self._refuse_rows(teacher, wanted)
        with growth_told(self._folders[teacher], self._records[teacher]):
            self._rows.open(teacher, layout, wanted)
        return wanted

    def _refuse_rows(self, teacher: str, rows: list[int]) -> None:
        marks, count = self._row_marks(teacher), self.rows
        for row in rows:
            if not 0 <= row < count:
                raise StoreError(f"row {row} is not in the store, it has {count} rows")
        bad = [row for row in rows if marks[row] != VALID]
        if bad:
            index = bad[0] // self._root.views_per_image
            raise StoreError(
                f"{len(bad)} of {len(rows)} rows are quarantined for teacher {teacher!r}, the "
                f"first is row {bad[0]}, image {self.images.ids[index]!r} "
                f"({self.images.statuses[index]}); ask valid() which rows have features"
            )
