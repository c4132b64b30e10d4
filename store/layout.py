"""The files of format 1: which arrays there are, their Zarr v3 metadata, paths and sizes.

The metadata documents are written out here, not taken from a library, so that one version of the
format is the same bytes under every version of zarr, and so that a reader can compare a document
with the only one allowed before it believes a shape. Every array is cut along its first axis only:

* feature arrays use Zarr's `sharding_indexed` codec, an inner chunk is one row;
* all others hold one small chunk per file.

Chunks end in a crc32c; nothing is compressed. Text is UTF-8 bytes in a uint8 matrix, padded with
zeros: Zarr v3 has no text type yet that every reader opens without a warning.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from store.spec import GLOBAL, TeacherSpec

METADATA = "zarr.json"
CHECKSUM_BYTES = 4
INDEX_ENTRY_BYTES = 16
TABLE_ROWS = 65_536
MAX_ROWS_PER_SHARD = 4_096

_DATA_TYPES = {
    "|u1": "uint8",
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
    NaN and never a plausible number.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dimensions: tuple[str, ...]
    row_chunks: bool = False

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
            "data_type": _DATA_TYPES[self.dtype],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": "NaN" if kind == "f" else False if kind == "b" else 0,
            "codecs": self._codecs(),
            "attributes": {},
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
    path: str, dtype: str, shape: tuple[int, ...], dimensions: tuple[str, ...]
) -> ArrayLayout:
    """Return the layout of a small array, cut every `TABLE_ROWS` entries."""
    chunk = (min(shape[0], TABLE_ROWS), *shape[1:]) if shape else ()
    return ArrayLayout(path=path, dtype=dtype, shape=shape, chunk=chunk, dimensions=dimensions)


def group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the Zarr v3 metadata of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def default_rows_per_shard(spec: TeacherSpec, shard_bytes: int) -> int:
    """Return how many rows of the largest level fit a shard of `shard_bytes`, at least one."""
    largest = max(level.grid[0] * level.grid[1] * level.channels * 2 for level in spec.levels)
    return max(1, min(MAX_ROWS_PER_SHARD, shard_bytes // largest))


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLayout:
    """Every array below a teacher's folder."""

    spec: TeacherSpec
    rows: int
    rows_per_shard: int
    covariance: bool = False

    @property
    def shards(self) -> int:
        """Number of shards of every array of the teacher."""
        return math.ceil(self.rows / self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Return the rows of a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def features(self) -> dict[str, ArrayLayout]:
        """Return the feature arrays by level name, `global` last where there is a pooled output."""
        arrays = {
            level.name: self._feature(
                f"{level.name}/native", (*level.grid, level.channels), ("y", "x", "channel")
            )
            for level in self.spec.levels
        }
        if self.spec.global_channels is not None:
            arrays[GLOBAL] = self._feature(GLOBAL, (self.spec.global_channels,), ("channel",))
        return arrays

    def _feature(
        self, path: str, row_shape: tuple[int, ...], dimensions: tuple[str, ...]
    ) -> ArrayLayout:
        return ArrayLayout(
            path=path,
            dtype="<f2",
            shape=(self.rows, *row_shape),
            chunk=(self.rows_per_shard, *row_shape),
            dimensions=("row", *dimensions),
            row_chunks=True,
        )

    def valid(self) -> ArrayLayout:
        """Return the layout of the row marks, whose chunks are the commit marks."""
        return ArrayLayout(
            path="valid",
            dtype="|u1",
            shape=(self.rows,),
            chunk=(self.rows_per_shard,),
            dimensions=("row",),
        )

    def digests(self) -> ArrayLayout:
        """Return the layout of the SHA-256 of each shard file, arrays in the order of features."""
        entry = (len(self.features()), 32)
        return ArrayLayout(
            path="commit/digest",
            dtype="|u1",
            shape=(self.shards, *entry),
            chunk=(1, *entry),
            dimensions=("shard", "array", "byte"),
        )

    def moments(self) -> ArrayLayout:
        """Return the layout of count, mean and M2 of each shard, levels' channels in a line."""
        entry = (3, sum(level.channels for level in self.spec.levels))
        return ArrayLayout(
            path="commit/statistics",
            dtype="<f8",
            shape=(self.shards, *entry),
            chunk=(1, *entry),
            dimensions=("shard", "moment", "channel"),
        )

    def comoments(self) -> ArrayLayout:
        """Return the layout of the co-moments of each shard, where the covariance was asked for.

        Levels follow each other in a line, of each the lower triangle by rows: C (C + 1) / 2
        float64, which is 2.4 MB per level and shard for C = 768.
        """
        entry = (sum(level.channels * (level.channels + 1) // 2 for level in self.spec.levels),)
        return ArrayLayout(
            path="commit/covariance",
            dtype="<f8",
            shape=(self.shards, *entry),
            chunk=(1, *entry),
            dimensions=("shard", "entry"),
        )

    def commits(self) -> list[ArrayLayout]:
        """Return the arrays that have a checksummed file per shard, the commit marks aside."""
        always = [self.digests(), self.moments()]
        return [*always, self.comoments()] if self.covariance else always

    def statistics(self, level: str) -> dict[str, ArrayLayout]:
        """Return the layouts of a level's mean, variance, count, and covariance if asked for."""
        channels = {entry.name: entry.channels for entry in self.spec.levels}[level]
        folder = f"{level}/stats"
        arrays = {
            "mean": table_layout(f"{folder}/mean", "<f8", (channels,), ("channel",)),
            "variance": table_layout(f"{folder}/variance", "<f8", (channels,), ("channel",)),
            "count": table_layout(f"{folder}/count", "<i8", (), ()),
        }
        if self.covariance:
            arrays["covariance"] = table_layout(
                f"{folder}/covariance", "<f8", (channels, channels), ("channel", "other_channel")
            )
        return arrays

    def documents(self) -> dict[str, dict[str, Any]]:
        """Return each metadata file below the teacher's own, but for the finished statistics."""
        groups = ["commit", *(level.name for level in self.spec.levels)]
        arrays = [*self.features().values(), self.valid(), *self.commits()]
        return {
            **{f"{group}/{METADATA}": group_document({}) for group in groups},
            **{f"{array.path}/{METADATA}": array.document() for array in arrays},
        }

    def statistics_documents(self) -> dict[str, dict[str, Any]]:
        """Return the metadata files that are added when the teacher is finished."""
        documents: dict[str, dict[str, Any]] = {}
        for level in self.spec.levels:
            documents[f"{level.name}/stats/{METADATA}"] = group_document({})
            for array in self.statistics(level.name).values():
                documents[f"{array.path}/{METADATA}"] = array.document()
        return documents
