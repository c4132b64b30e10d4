"""A teacher's folder: its own description, which shards are committed, which rows are valid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.chunks import read_chunk
from store.codecs import parse_codec
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
from store.files import remove_file, remove_tree
from store.images import OK
from store.layout import METADATA, group_document
from store.measured import MEASURED
from store.remote import StorePath, each
from store.spec import FORMAT, FORMAT_VERSION, TeacherSpec
from store.stored_codecs import (
    Calibrate,
    calibrate_codecs,
    check_codec,
    read_stored_codecs,
)
from store.tables import RootRecord, TableState, read_images, read_root, read_views
from store.teacher_layout import StoredCodec, TeacherLayout, with_rows_per_shard

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
    covariance: bool = False
    """Whether covariances are gathered; no part of the fingerprint, for it changes no feature."""
    codecs: Mapping[str, StoredCodec] = field(default_factory=dict)
    """The fitted codec of each target by name; empty where floats are stored."""

    @property
    def layout(self) -> TeacherLayout:
        """The arrays below the folder."""
        return TeacherLayout(
            spec=self.spec,
            rows=self.rows,
            rows_per_shard=self.rows_per_shard,
            covariance=self.covariance,
            codecs=self.codecs,
        )

    @property
    def state(self) -> TableState:
        """The images and views that the teacher saw."""
        return TableState(
            images_digest=self.images_digest, views_digest=self.views_digest, rows=self.rows
        )

    def belongs_to(self, root: RootRecord) -> bool:
        """Return whether the teacher saw the images and views that the store lists now."""
        return self.state == root.state

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
            "covariance": self.covariance,
            "codecs": {name: codec.to_attributes() for name, codec in self.codecs.items()},
        }


def is_teacher(folder: StorePath) -> bool:
    """Return whether a folder of a store holds a teacher, finished or begun."""
    if folder.name.startswith(".") or not (folder / METADATA).is_file():
        return False
    attributes = load_document(folder / METADATA).get("attributes")
    return isinstance(attributes, dict) and attributes.get("kind") == "teacher"


def teacher_folders(path: StorePath) -> list[StorePath]:
    """Return the folders of a store's teachers, by name."""
    folders = [folder for folder in path.iterdir() if is_teacher(folder)]
    return sorted(folders, key=lambda folder: folder.name)


def read_record(folder: StorePath) -> TeacherRecord:
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
            codecs=read_stored_codecs(attributes.get("codecs")),
            spec=TeacherSpec.from_attributes(spec if isinstance(spec, dict) else {}),
            rows=read_count(attributes, "rows"),
            rows_per_shard=read_count(attributes, "rows_per_shard"),
            images_digest=str(attributes.get("images_digest")),
            views_digest=str(attributes.get("views_digest")),
            finished=attributes.get("finished") is True,
            covariance=attributes.get("covariance") is True,
        )
    except StoreError as error:
        raise StoreDamagedError(f"{path} is damaged: {error}") from error
    wrong = [key for key, value in record.to_attributes().items() if attributes.get(key) != value]
    targets = {target.name for target in record.spec.targets}
    if not wrong and record.codecs.keys() != (
        set() if parse_codec(record.spec.codec).is_float else targets
    ):
        wrong = ["codecs"]
    if wrong or record.spec.name != folder.name:
        detail = ", ".join(wrong) or f"it describes teacher {record.spec.name!r}"
        raise StoreDamagedError(f"{path} contradicts itself ({detail}); delete {folder}")
    try:
        for target in record.spec.targets if record.codecs else ():
            check_codec(record.spec.codec, target, record.codecs[target.name])
    except StoreDamagedError as error:
        raise StoreDamagedError(f"{path} is damaged: {error}") from error
    return record


def is_earlier(path: StorePath, record: TeacherRecord) -> bool:
    """Return whether a teacher was begun before images were added to the store, or admitted.

    Then its rows are the store's first, and missing are only those behind them and the shards
    whose quarantined images have been admitted since.
    """
    root = read_root(path)
    if record.state in root.earlier:
        return True
    if record.rows >= root.rows or record.rows % root.views_per_image:
        return False
    images = read_images(path).take(range(record.rows // root.views_per_image))
    views = read_views(path).first(record.rows)
    return (images.digest(), views.digest()) == (record.images_digest, record.views_digest)


def begin_teacher(
    folder: StorePath, asked: TeacherRecord, shard_bytes: int, calibrate: Calibrate | None
) -> TeacherRecord:
    """Return the record to go on with, its metadata files in place; in one's turn only.

    A teacher that is not there yet is cut into shards of `shard_bytes` and, where its codec needs
    it, calibrated by `calibrate`. One that is earlier than the images grows: its short last shard
    is of the wrong size and has unwritten marks from then on, so it is asked for again, as are
    shards with images that were admitted; other shards are not touched, and its codecs stay.

    Raises:
        StoreMismatchError: the folder holds something else than asked for.
        StoreError: a codec has to be fitted, and there is no `calibrate`.
    """
    if (folder / METADATA).exists():
        stored = read_record(folder)
        _refuse_other_cut(folder, stored)
        record = _continued(folder, stored, asked)
        if record.images_digest != stored.images_digest:
            reopen_admitted(folder, stored.layout)
        write_record(folder, record)  # first of all: no longer finished, once its arrays grow
    else:  # somebody may have deleted the description only: what is there is not to be trusted
        remove_tree(folder / "valid")
        for table in MEASURED:
            table.remove(folder)
        write_document(folder / "commit" / METADATA, group_document({}))  # what `gc` knows it by
        record = replace(asked, codecs=calibrate_codecs(folder, asked.spec, calibrate))
        layout = with_rows_per_shard(record.layout, shard_bytes)
        record = replace(record, rows_per_shard=layout.rows_per_shard)
    documents = record.layout.documents()
    each(folder, lambda path: write_document(folder / path, documents[path]), documents)
    write_record(folder, record)
    return record


def reopen_admitted(folder: StorePath, layout: TeacherLayout) -> None:
    """Take back the mark of every shard that holds no features of an image that is ok now.

    While the description is still that of before: if this is stopped, it is done again.
    """
    root = read_root(folder.parent)
    statuses = read_images(folder.parent).statuses
    usable = np.repeat([status == OK for status in statuses], root.views_per_image)
    for shard in range(layout.shards):
        rows = layout.shard_rows(shard)
        try:
            marks = read_chunk(folder, layout.valid(), shard)
        except (FileNotFoundError, StoreDamagedError):
            continue  # not committed
        if np.any((marks == QUARANTINED) & usable[rows.start : rows.stop]):
            remove_file(folder / layout.valid().file_path(shard))


def _refuse_other_cut(folder: StorePath, record: TeacherRecord) -> None:
    """Refuse a description whose shards are not those on disk, before anything is written.

    Raises:
        StoreDamagedError: an array there is cut otherwise than described.
    """
    layout = record.layout
    for array in [*layout.features().values(), layout.valid()]:
        path = folder / array.path / METADATA
        if (
            path.exists()
            and load_document(path).get("chunk_grid") != array.document()["chunk_grid"]
        ):
            raise StoreDamagedError(
                f"{folder / METADATA} says {record.rows_per_shard} rows per shard, {path} has "
                "another shard; one of them is damaged, and nothing was written. Put the right file "
                f"back, or delete {folder} to extract this teacher anew"
            )


def _continued(folder: StorePath, stored: TeacherRecord, asked: TeacherRecord) -> TeacherRecord:
    # How it is cut, what its codecs were fitted to and how far it got are no difference, nor are
    # covariances beyond what is asked for: a resumed teacher keeps them.
    same = replace(
        asked,
        rows_per_shard=stored.rows_per_shard,
        finished=stored.finished,
        codecs=stored.codecs,
        covariance=asked.covariance or stored.covariance,
    )
    kept = (stored.spec, stored.covariance) == (same.spec, same.covariance)
    if kept and is_earlier(folder.parent, stored):
        return replace(same, finished=False)
    if stored != same:
        lines = difference(stored.to_attributes(), same.to_attributes())
        raise StoreMismatchError(
            f"teacher {stored.spec.name!r} is in the store already, extracted differently:\n"
            + "\n".join(lines)
            + f"\nChoose another store path, or delete {folder} to extract it anew.",
            stored.spec.name,
        )
    return stored


def refuse_unusable(folder: StorePath, record: TeacherRecord, root: RootRecord) -> None:
    """Refuse to read a teacher of other images, or one that is not finished.

    Raises:
        StoreMismatchError: the store's images or views changed since.
        UnfinishedStoreError: shards are missing, or images were added since.
    """
    name = record.spec.name
    if not record.belongs_to(root):
        if is_earlier(folder.parent, record):
            raise UnfinishedStoreError(
                f"teacher {name!r} is not finished: images were added since or taken out of "
                f"quarantine, it has seen {record.rows} of {root.rows} rows; run `sak "
                f"extract-teachers {name}`, it computes only what is missing"
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


def write_record(folder: StorePath, record: TeacherRecord) -> None:
    """Place a teacher's description, atomically."""
    write_document(folder / METADATA, group_document(record.to_attributes()))


def is_committed(folder: StorePath, layout: TeacherLayout, shard: int) -> bool:
    """Return whether a shard's commit mark is there and its files have their full size."""
    try:
        marks = read_chunk(folder, layout.valid(), shard)
        sizes = [
            (folder / array.file_path(shard)).stat().st_size == array.file_bytes(shard)
            for array in layout.features().values()
        ]
        for array in layout.commits():
            read_chunk(folder, array, shard)
    except (FileNotFoundError, StoreDamagedError):
        return False
    return all(sizes) and bool(np.all(marks != UNWRITTEN))


def missing_shards(
    folder: StorePath, layout: TeacherLayout, among: Sequence[int] | None = None
) -> list[int]:
    """Return the shards that are not committed, of all or `among` some, in order."""
    shards = range(layout.shards) if among is None else among
    committed = each(folder, lambda shard: is_committed(folder, layout, shard), shards)
    return [shard for shard, done in zip(shards, committed, strict=True) if not done]


def read_marks(folder: StorePath, layout: TeacherLayout) -> NDArray[np.uint8]:
    """Return the mark of every row of a finished teacher: `VALID` or `QUARANTINED`.

    Raises:
        StoreDamagedError: a mark is missing or has another value.
    """
    array = layout.valid()
    check_document(folder / array.path / METADATA, array.document())
    chunks = each(folder, lambda number: read_chunk(folder, array, number), range(array.files))
    marks = np.concatenate(chunks)
    if not np.isin(marks, (VALID, QUARANTINED)).all():
        raise StoreDamagedError(f"{folder / array.path} marks rows of a finished store unwritten")
    return marks
