"""The root of a store and its tables of images and views."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.chunks import read_array, read_chunk, write_array
from store.documents import load_document, read_attributes, read_count, write_document
from store.errors import (
    StoreDamagedError,
    StoreError,
    StoreFormatError,
)
from store.files import ready_path
from store.images import ImageTable, ViewTable
from store.layout import METADATA, ArrayLayout, group_document, table_layout
from store.remote import StorePath
from store.spec import FORMAT, FORMAT_VERSION

_SHA256_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """Which images and views, in so many rows, a store had or a teacher was extracted for."""

    images_digest: str
    views_digest: str
    rows: int

    @classmethod
    def from_attributes(cls, attributes: Any) -> "TableState":
        """Return the state that JSON values describe.

        Raises:
            StoreDamagedError: they describe none.
        """
        values = attributes if isinstance(attributes, dict) else {}
        return cls(
            images_digest=str(values.get("images_digest")),
            views_digest=str(values.get("views_digest")),
            rows=read_count(values, "rows"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RootRecord:
    """The attributes of the store's root; two are equal when they are of the same tables.

    `photometric` tells whether views change colours.
    """

    images: int
    images_digest: str
    views_digest: str
    image_size: tuple[int, int]
    views_per_image: int
    photometric: bool = False
    earlier: tuple[TableState, ...] = field(default=(), compare=False)
    """States of before quarantined images were admitted, see `store.admit`."""

    @property
    def state(self) -> TableState:
        """The images and views of now."""
        return TableState(
            images_digest=self.images_digest, views_digest=self.views_digest, rows=self.rows
        )

    @property
    def rows(self) -> int:
        """Number of (image, view) pairs."""
        return self.images * self.views_per_image

    def to_attributes(self) -> dict[str, Any]:
        """Return the record as plain JSON values; `photometric` is only said where it is so."""
        earlier = {"earlier": [asdict(state) for state in self.earlier]} if self.earlier else {}
        attributes = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "images": self.images,
            "images_digest": self.images_digest,
            "views_digest": self.views_digest,
            "image_size": list(self.image_size),
            "views_per_image": self.views_per_image,
            **earlier,
        }
        return {**attributes, "photometric": True} if self.photometric else attributes


def read_root(path: StorePath) -> RootRecord:
    """Return what the store says about itself.

    Raises:
        StoreError: there is no store.
        StoreFormatError: the folder is no feature store, or one of another version.
        StoreDamagedError: its metadata contradicts its files.
    """
    if not path.is_dir():
        raise StoreError(f"there is no feature store at {path}; run `sak index` first")
    if not (path / METADATA).exists():
        if ready_path(path).is_dir():
            raise StoreFormatError(
                f"{path} was stopped while images were added; run `sak index --append`, it resumes"
            )
        raise StoreFormatError(
            f"{path} is not a feature store: it has no {METADATA}; run `sak index`"
        )
    attributes = read_attributes(path / METADATA)
    size = attributes.get("image_size")
    sides = dict(zip(("height", "width"), size if isinstance(size, list) else [], strict=False))
    record = RootRecord(
        images=read_count(attributes, "images"),
        images_digest=str(attributes.get("images_digest")),
        views_digest=str(attributes.get("views_digest")),
        image_size=(read_count(sides, "height"), read_count(sides, "width")),
        views_per_image=read_count(attributes, "views_per_image"),
        photometric="photometric" in attributes,
        earlier=_earlier_states(attributes.get("earlier", [])),
    )
    if attributes.get("photometric", True) is not True:
        raise StoreDamagedError(
            f"photometric must be true or absent, got {attributes['photometric']!r:.80}"
        )
    heights = _column("images", "height", (record.images,))
    read_chunk(path, heights, heights.files - 1)  # so many images there must be, before any loop
    return record


def _earlier_states(listed: Any) -> tuple[TableState, ...]:
    if not isinstance(listed, list):
        raise StoreDamagedError(f"earlier states of a store are a list, not {listed!r:.80}")
    return tuple(map(TableState.from_attributes, listed))


def write_tables(folder: StorePath, images: ImageTable, views: ViewTable) -> None:
    """Write `images/` and `views/` below a folder that nobody reads yet."""
    hashes = "".join(digest or "0" * 2 * _SHA256_BYTES for digest in images.sha256)
    columns = {
        "id": _encode_text(images.ids),
        "sha256": np.frombuffer(bytes.fromhex(hashes), np.uint8).reshape(-1, _SHA256_BYTES),
        "height": np.asarray(images.heights, "<i4"),
        "width": np.asarray(images.widths, "<i4"),
        "status": _encode_text(images.statuses),
    }
    for group in (
        "images",
        "views",
    ):  # first, so that on object storage a torn one is known as such
        write_document(folder / group / METADATA, group_document({}))
    for name, values in columns.items():
        write_array(folder, _column("images", name, values.shape), values)
    columns = {"box": views.boxes, "flip": views.flips, "seed": views.seeds}
    if views.photometric is not None:
        columns["photometric"] = views.photometric
    for name, values in columns.items():
        write_array(folder, _column("views", name, values.shape), values)


_DTYPES = {
    "id": "|u1",
    "sha256": "|u1",
    "height": "<i4",
    "width": "<i4",
    "status": "|u1",
    "box": "<f4",
    "flip": "|b1",
    "seed": "<u8",
    "photometric": "<f4",
}
_SECOND = {"box": "side", "photometric": "factor"}


def _column(group: str, name: str, shape: tuple[int, ...]) -> ArrayLayout:
    first = "image" if group == "images" else "row"
    second = _SECOND.get(name, f"{name}_byte")
    dimensions = (first, second)[: len(shape)]
    return table_layout(f"{group}/{name}", _DTYPES[name], shape, dimensions)


def table_layouts(images: ImageTable, rows: int, *, photometric: bool = False) -> list[ArrayLayout]:
    """Return the layouts of the columns that hold these images and so many views."""
    widths = {name: _encode_text(texts).shape[1] for name, texts in
              (("id", images.ids), ("status", images.statuses))}  # fmt: skip
    extents: dict[str, tuple[int, ...]] = {
        **{name: (width,) for name, width in widths.items()},
        "sha256": (_SHA256_BYTES,),
        "height": (),
        "width": (),
    }
    return [
        *(_column("images", name, (len(images), *extent)) for name, extent in extents.items()),
        _column("views", "box", (rows, 4)),
        _column("views", "flip", (rows,)),
        _column("views", "seed", (rows,)),
        *([_column("views", "photometric", (rows, 4))] if photometric else []),
    ]


def _encode_text(texts: tuple[str, ...]) -> NDArray[np.uint8]:
    encoded = np.array([text.encode() for text in texts])  # dtype S<longest>
    return encoded.view(np.uint8).reshape(len(texts), encoded.itemsize)


def _read_text(folder: StorePath, name: str, rows: int) -> tuple[str, ...]:
    path = folder / "images" / name / METADATA
    shape = load_document(path).get("shape")
    width = shape[-1] if isinstance(shape, list) and shape else None
    if not isinstance(width, int) or width < 1:
        raise StoreDamagedError(f"{path} has no valid shape: {shape!r:.80}")
    matrix = read_array(folder, _column("images", name, (rows, width)))
    try:
        texts = np.ascontiguousarray(matrix).view(f"S{width}").ravel().tolist()
        return tuple(text.decode() for text in texts)
    except UnicodeDecodeError as error:
        raise StoreDamagedError(f"{path.parent} holds no UTF-8 text: {error}") from error


def read_images(path: StorePath) -> ImageTable:
    """Return the images of a store.

    Raises:
        StoreDamagedError: the table does not have the digest that the root records.
    """
    root = read_root(path)

    def column(name: str, *shape: int) -> NDArray[Any]:
        return read_array(path, _column("images", name, (root.images, *shape)))

    blank = bytes(_SHA256_BYTES)
    hashes = [row.tobytes() for row in column("sha256", _SHA256_BYTES)]
    table = ImageTable(
        ids=_read_text(path, "id", root.images),
        sha256=tuple("" if digest == blank else digest.hex() for digest in hashes),
        heights=tuple(column("height").tolist()),
        widths=tuple(column("width").tolist()),
        statuses=_read_text(path, "status", root.images),
    )
    if table.digest() != root.images_digest:
        raise StoreDamagedError(f"{path / 'images'} does not have the digest recorded at the root")
    return table


def read_views(path: StorePath) -> ViewTable:
    """Return the views of a store.

    Raises:
        StoreDamagedError: the table does not have the digest that the root records.
    """
    root = read_root(path)

    def column(name: str, *shape: int) -> NDArray[Any]:
        return read_array(path, _column("views", name, (root.rows, *shape)))

    columns = {"boxes": column("box", 4), "flips": column("flip"), "seeds": column("seed")}
    if root.photometric:
        columns["photometric"] = column("photometric", 4)
    try:
        table = ViewTable(
            image_size=root.image_size, views_per_image=root.views_per_image, **columns
        )
    except StoreError as error:  # factors that no view table has
        raise StoreDamagedError(f"{path / 'views'} is damaged: {error}") from error
    if table.digest() != root.views_digest:
        raise StoreDamagedError(f"{path / 'views'} does not have the digest recorded at the root")
    return table
