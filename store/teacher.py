"""A teacher's folder: its own description, which shards are committed, which rows are valid."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.chunks import read_chunk
from store.documents import (
    check_document,
    load_document,
    read_attributes,
    read_count,
    write_document,
)
from store.errors import (
    StoreDamagedError,
    StoreError,
    StoreMismatchError,
    UnfinishedStoreError,
    difference,
)
from store.files import remove_partials
from store.layout import METADATA, TeacherLayout, group_document
from store.spec import FORMAT, FORMAT_VERSION, TeacherSpec
from store.tables import RootRecord, read_images, read_root, read_views

UNWRITTEN, VALID, QUARANTINED = 0, 1, 2
"""Values of a teacher's `valid` array."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRecord:
    """The attributes of a teacher's folder, which make it understandable on its own."""

    spec: TeacherSpec
    rows: int
    rows_per_shard: int
    images_digest: str
    views_digest: str
    finished: bool

    @property
    def layout(self) -> TeacherLayout:
        """The arrays below the folder."""
        return TeacherLayout(spec=self.spec, rows=self.rows, rows_per_shard=self.rows_per_shard)

    def belongs_to(self, root: RootRecord) -> bool:
        """Return whether the teacher saw the images and views that the store lists now."""
        return (self.images_digest, self.views_digest, self.rows) == (
            root.images_digest,
            root.views_digest,
            root.rows,
        )

    def to_attributes(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {
            "kind": "teacher",
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "spec": self.spec.to_attributes(),
            "fingerprint": self.spec.fingerprint(),
            "rows": self.rows,
            "rows_per_shard": self.rows_per_shard,
            "images_digest": self.images_digest,
            "views_digest": self.views_digest,
            "finished": self.finished,
        }


def is_teacher(folder: Path) -> bool:
    """Return whether a folder of a store holds a teacher, finished or begun."""
    if folder.name.startswith(".") or not (folder / METADATA).is_file():
        return False
    attributes = load_document(folder / METADATA).get("attributes")
    return isinstance(attributes, dict) and attributes.get("kind") == "teacher"


def read_record(folder: Path) -> TeacherRecord:
    """Return what a teacher's folder says about itself, after checking that it hangs together.

    Raises:
        StoreDamagedError: the description contradicts itself or the folder's name.
        StoreFormatError: it is of another format or version.
    """
    path = folder / METADATA
    attributes = read_attributes(path)
    spec = attributes.get("spec")
    try:
        record = TeacherRecord(
            spec=TeacherSpec.from_attributes(spec if isinstance(spec, dict) else {}),
            rows=read_count(attributes, "rows"),
            rows_per_shard=read_count(attributes, "rows_per_shard"),
            images_digest=str(attributes.get("images_digest")),
            views_digest=str(attributes.get("views_digest")),
            finished=attributes.get("finished") is True,
        )
    except StoreError as error:
        raise StoreDamagedError(f"{path} is damaged: {error}") from error
    wrong = [key for key, value in record.to_attributes().items() if attributes.get(key) != value]
    if wrong or record.spec.name != folder.name:
        detail = ", ".join(wrong) or f"it describes teacher {record.spec.name!r}"
        raise StoreDamagedError(f"{path} contradicts itself ({detail}); delete {folder}")
    return record


def is_earlier(path: Path, record: TeacherRecord) -> bool:
    """Return whether a teacher was begun before images were added to the store at `path`.

    Then its rows are the store's first, and only those behind them are missing.
    """
    root = read_root(path)
    if record.rows >= root.rows or record.rows % root.views_per_image:
        return False
    images = read_images(path).take(range(record.rows // root.views_per_image))
    views = read_views(path).first(record.rows)
    return (images.digest(), views.digest()) == (record.images_digest, record.views_digest)


def begin_teacher(folder: Path, asked: TeacherRecord) -> TeacherRecord:
    """Return the record to go on with, its metadata files in place; only the lock's holder may.

    A teacher that is earlier than the images grows: its short last shard is of the wrong size and
    has unwritten marks from then on, so it is asked for again; whole shards are not touched.

    Raises:
        StoreMismatchError: the folder holds something else than asked for.
    """
    record = asked
    if (folder / METADATA).exists():
        record = _continued(folder, read_record(folder), asked)
        write_record(folder, record)  # first of all: no longer finished, once its arrays grow
    else:  # somebody may have deleted the description only: what is there is not to be trusted
        shutil.rmtree(folder / record.layout.valid().path, ignore_errors=True)
    remove_partials(folder)
    for path, document in record.layout.documents().items():
        write_document(folder / path, document)
    write_record(folder, record)
    return record


def _continued(folder: Path, stored: TeacherRecord, asked: TeacherRecord) -> TeacherRecord:
    # How it is cut and how far it got are no difference: a resumed teacher keeps both.
    same = replace(asked, rows_per_shard=stored.rows_per_shard, finished=stored.finished)
    if stored.spec == asked.spec and is_earlier(folder.parent, stored):
        return replace(same, finished=False)
    if stored != same:
        lines = difference(stored.to_attributes(), same.to_attributes())
        raise StoreMismatchError(
            f"teacher {stored.spec.name!r} is in the store already, extracted differently:\n"
            + "\n".join(lines)
            + f"\nChoose another store path, or delete {folder} to extract it anew."
        )
    return stored


def refuse_unusable(folder: Path, record: TeacherRecord, root: RootRecord) -> None:
    """Refuse to read a teacher of other images, or one that is not finished.

    Raises:
        StoreMismatchError: the store's images or views changed since.
        UnfinishedStoreError: shards are missing, or images were added since.
    """
    name = record.spec.name
    if not record.belongs_to(root):
        if is_earlier(folder.parent, record):
            raise UnfinishedStoreError(
                f"teacher {name!r} is not finished: images were added since, it has seen "
                f"{record.rows} of {root.rows} rows; run `sak extract-teachers {name}`, it "
                "computes only what is missing"
            )
        raise StoreMismatchError(
            f"teacher {name!r} was extracted for other images or views than {folder.parent} "
            f"now lists; delete {folder} and run `sak extract-teachers`"
        )
    if not record.finished:
        missing = len(missing_shards(folder, record.layout))
        raise UnfinishedStoreError(
            f"teacher {name!r} is not finished: {missing} of {record.layout.shards} shards "
            "are missing; run `sak extract-teachers` again, it resumes"
        )


def write_record(folder: Path, record: TeacherRecord) -> None:
    """Place a teacher's description, atomically."""
    write_document(folder / METADATA, group_document(record.to_attributes()))


def is_committed(folder: Path, layout: TeacherLayout, shard: int) -> bool:
    """Return whether a shard's commit mark is there and its files have their full size."""
    try:
        marks = read_chunk(folder, layout.valid(), shard)
        sizes = [
            (folder / array.file_path(shard)).stat().st_size == array.file_bytes(shard)
            for array in layout.features().values()
        ]
        read_chunk(folder, layout.digests(), shard)
        read_chunk(folder, layout.moments(), shard)
    except (FileNotFoundError, StoreDamagedError):
        return False
    return all(sizes) and bool(np.all(marks != UNWRITTEN))


def missing_shards(folder: Path, layout: TeacherLayout) -> list[int]:
    """Return the shards that are not committed, in order."""
    return [shard for shard in range(layout.shards) if not is_committed(folder, layout, shard)]


def read_marks(folder: Path, layout: TeacherLayout) -> NDArray[np.uint8]:
    """Return the mark of every row of a finished teacher: `VALID` or `QUARANTINED`.

    Raises:
        StoreDamagedError: a mark is missing or has another value.
    """
    array = layout.valid()
    check_document(folder / array.path / METADATA, array.document())
    marks = np.concatenate([read_chunk(folder, array, number) for number in range(array.files)])
    if not np.isin(marks, (VALID, QUARANTINED)).all():
        raise StoreDamagedError(f"{folder / array.path} marks rows of a finished store unwritten")
    return marks
