"""How many bytes and files a store will have, told from its description before it is written."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from store.calibration import FittedTarget
from store.codecs import parse_codec
from store.documents import encode_document
from store.figures import FigureTable
from store.images import ImageTable
from store.layout import METADATA, ArrayLayout, group_document, table_layout
from store.spec import TeacherSpec
from store.stored_codecs import describe_codec
from store.tables import RootRecord, table_layouts
from store.teacher import TeacherRecord
from store.teacher_layout import codec_layouts, with_rows_per_shard

_DIGEST = "0" * 64  # of the length that the real one will have


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Bytes of files, without what the file system adds, and their number."""

    bytes: int
    files: int

    def __add__(self, other: "Size") -> "Size":
        return Size(bytes=self.bytes + other.bytes, files=self.files + other.files)


def future_record(
    spec: TeacherSpec,
    fitted: Mapping[str, FittedTarget],
    rows: int,
    shard_bytes: int,
    *,
    covariance: bool = False,
) -> TeacherRecord:
    """Return what the folder of a finished teacher of `rows` rows will say of itself.

    `fitted` are the codecs of its targets by name, needed where `spec.codec` has to be fitted.
    They may be fitted to other rows than those of the extraction: of the low-rate codecs the
    tables then differ a little in size, the features do not.
    """
    codecs = {
        target.name: describe_codec(spec.codec, target, fitted[target.name])
        for target in spec.targets
        if not parse_codec(spec.codec).is_float
    }
    record = TeacherRecord(
        spec=spec,
        rows=rows,
        rows_per_shard=1,
        images_digest=_DIGEST,
        views_digest=_DIGEST,
        finished=True,
        covariance=covariance,
        codecs=codecs,
    )
    cut = with_rows_per_shard(record.layout, shard_bytes).rows_per_shard
    return replace(record, rows_per_shard=cut)


def teacher_size(record: TeacherRecord, measured: Sequence[FigureTable] = ()) -> Size:
    """Return the size of a teacher's folder once it is finished, with what is measured of it."""
    layout = record.layout
    documents = {
        METADATA: group_document(record.to_attributes()),
        **layout.documents(),
        **layout.statistics_documents(),
    }
    arrays = [*layout.features().values(), layout.valid(), *layout.commits()]
    for target in record.spec.targets:
        arrays += layout.statistics(target).values()
        if target.name in record.codecs:
            arrays += codec_layouts(target, record.codecs[target.name]).values()
    for table in measured:
        documents |= table.documents(record.spec)
        arrays += table.layouts(record.spec).values()
    return _documents_size(documents.values()) + _arrays_size(arrays)


def tables_size(
    images: ImageTable,
    count: int,
    image_size: tuple[int, int],
    *,
    views_per_image: int = 1,
    photometric: bool = False,
) -> Size:
    """Return the size of the root and its tables, for `count` images of ids like these.

    `image_size` is (height, width) in pixels.
    """
    root = RootRecord(
        images=count,
        images_digest=_DIGEST,
        views_digest=_DIGEST,
        image_size=image_size,
        views_per_image=views_per_image,
        photometric=photometric,
    )
    columns = [
        table_layout(
            column.path,
            column.dtype,
            (count if column.path.startswith("images/") else root.rows, *column.shape[1:]),
            column.dimensions,
        )
        for column in table_layouts(images, root.rows, photometric=photometric)
    ]
    groups = [group_document(root.to_attributes()), group_document({}), group_document({})]
    documents = [*groups, *(column.document() for column in columns)]
    return _documents_size(documents) + _arrays_size(columns)


def row_bytes(record: TeacherRecord) -> int:
    """Return the bytes of a teacher's row as stored, without checksums."""
    return sum(array.row_bytes for array in record.layout.features().values())


def float32_ratio(record: TeacherRecord) -> float:
    """Return how many times smaller the levels are than as float32."""
    arrays = record.layout.features()
    targets = record.spec.targets
    plain = sum(4 * target.grid[0] * target.grid[1] * target.channels for target in targets)
    return plain / sum(arrays[target.name].row_bytes for target in targets)


def _arrays_size(arrays: Iterable[ArrayLayout]) -> Size:
    total = Size(bytes=0, files=0)
    for array in arrays:
        # All files but the last one are alike.
        whole = (array.files - 1) * array.file_bytes(0) + array.file_bytes(array.files - 1)
        total += Size(bytes=whole, files=array.files)
    return total


def _documents_size(documents: Iterable[dict[str, Any]]) -> Size:
    sizes = [len(encode_document(document)) for document in documents]
    return Size(bytes=sum(sizes), files=len(sizes))
