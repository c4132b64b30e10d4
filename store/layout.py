"""The files of the format: which arrays there are, their Zarr v3 metadata, paths and sizes.

The metadata documents are written out here, not taken from a library, so that one version of the
format is the same bytes under every version of zarr, and so that a reader can compare a document
with the only one allowed before it believes a shape. Every array is cut along its first axis only:

* feature arrays use Zarr's `sharding_indexed` codec, an inner chunk is one row;
* all others hold one small chunk per file.

Chunks end in a crc32c; nothing is compressed. Text is UTF-8 bytes in a uint8 matrix, padded with
zeros: Zarr v3 has no text type yet that every reader opens without a warning.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

METADATA = "zarr.json"
CHECKSUM_BYTES = 4
INDEX_ENTRY_BYTES = 16
TABLE_ROWS = 65_536

DATA_TYPES = {
    "|u1": "uint8",
    "|i1": "int8",
    "<u2": "uint16",
    "|b1": "bool",
    "<i4": "int32",
    "<i8": "int64",
    "<u8": "uint64",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
}
_SEALED: list[dict[str, Any]] = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayLayout:
    """One array: `chunk` is the extent of one file along each axis; `row_chunks` cuts it in rows.

    Float arrays read as NaN where nothing was written, so that a mean over an unfinished store is
    NaN and never a plausible number. Coded arrays have no such number: they read as zeros there,
    and only `valid` tells.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dimensions: tuple[str, ...]
    row_chunks: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> int:
        """Number of chunk files."""
        return math.ceil(self.shape[0] / self.chunk[0]) if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry along the first axis."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def file_path(self, number: int) -> str:
        """Return the path of a chunk file, relative to the folder that `path` is relative to."""
        coordinates = [str(number)] + ["0"] * (len(self.shape) - 1) if self.shape else []
        return f"{self.path}/" + ".".join(["c", *coordinates])

    def file_rows(self, number: int) -> int:
        """Return how many entries of the first axis lie in a file; the last one may be short."""
        return min(self.chunk[0], self.shape[0] - number * self.chunk[0]) if self.shape else 1

    def file_bytes(self, number: int) -> int:
        """Return the size of a file: shards hold only the rows there are, chunks are padded."""
        if self.row_chunks:
            rows = self.file_rows(number) * (self.row_bytes + CHECKSUM_BYTES)
            return rows + self.chunk[0] * INDEX_ENTRY_BYTES + CHECKSUM_BYTES
        return math.prod(self.chunk) * np.dtype(self.dtype).itemsize + CHECKSUM_BYTES

    def document(self) -> dict[str, Any]:
        """Return the Zarr v3 metadata."""
        kind = np.dtype(self.dtype).kind
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": DATA_TYPES[self.dtype],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": "NaN" if kind == "f" else False if kind == "b" else 0,
            "codecs": self._codecs(),
            "attributes": dict(self.attributes),
            "dimension_names": list(self.dimensions),
        }

    def _codecs(self) -> list[dict[str, Any]]:
        if not self.row_chunks:
            return _SEALED
        sharding = {
            "chunk_shape": [1, *self.shape[1:]],
            "codecs": _SEALED,
            "index_codecs": _SEALED,
            "index_location": "end",
        }
        return [{"name": "sharding_indexed", "configuration": sharding}]


def table_layout(
    path: str,
    dtype: str,
    shape: tuple[int, ...],
    dimensions: tuple[str, ...],
    attributes: Mapping[str, Any] | None = None,
) -> ArrayLayout:
    """Return the layout of a small array, cut every `TABLE_ROWS` entries."""
    chunk = (min(shape[0], TABLE_ROWS), *shape[1:]) if shape else ()
    return ArrayLayout(
        path=path,
        dtype=dtype,
        shape=shape,
        chunk=chunk,
        dimensions=dimensions,
        attributes=attributes or {},
    )


def group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the Zarr v3 metadata of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}
