"""How the rows of a feature array lie in its files, and so how they are read: decided here alone.

| what its zarr.json says                                  | in a folder         | on object storage |
|----------------------------------------------------------|---------------------|-------------------|
| as this package writes it                                | `LocalShards`       | `RemoteShards`    |
| sharded in rows: blosc, gzip, zstd or nothing, then      | `CompressedShards`  | `ZarrRows`        |
| crc32c or nothing; any shard length, index place, names  |                     |                   |
| anything else that zarr reads: other codecs, no shards,  | `ZarrRows`          | `ZarrRows`        |
| chunks that cut rows                                     |                     |                   |

`sak` writes the first only. The others are what a user's own tool may make of an array when it
copies it; shape, type, fill value, names and attributes must stay what they were.
"""

from dataclasses import dataclass
from typing import Any

from store.documents import load_document, refuse_difference
from store.layout import ArrayLayout
from store.remote import StorePath

COMPRESSORS = ("blosc", "gzip", "zstd")

_FREE = ("chunk_grid", "chunk_key_encoding", "codecs", "storage_transformers")
_LITTLE = {"endian": "little"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShards:
    """Shard files whose inner chunks are rows."""

    rows: int
    """Slots of a shard."""
    compressor: str | None
    sealed: bool
    """Whether a row ends in its crc32c."""
    index_sealed: bool
    index_at_end: bool
    name_parts: tuple[str, str]
    """What file names begin with, and what separates their numbers."""

    def file_path(self, layout: ArrayLayout, number: int) -> str:
        """Return the path of a shard, relative to the folder that `layout.path` is relative to."""
        prefix, separator = self.name_parts
        numbers = [str(number)] + ["0"] * (len(layout.shape) - 1)
        return f"{layout.path}/{prefix}{separator.join(numbers)}"


def read_form(path: StorePath, layout: ArrayLayout) -> ArrayLayout | RowShards | None:
    """Return the form of an array from its metadata at `path`: ours, known, or None for zarr's.

    Raises:
        StoreDamagedError: the metadata is missing, or of another array than `layout`.
    """
    found, expected = load_document(path), layout.document()
    if found == expected:
        return layout
    refuse_difference(
        path,
        {key: value for key, value in found.items() if key not in _FREE},
        {key: value for key, value in expected.items() if key not in _FREE},
    )
    try:
        return _row_shards(found, layout)
    except (KeyError, TypeError, ValueError):  # another form, which zarr may know
        return None


def _row_shards(document: dict[str, Any], layout: ArrayLayout) -> RowShards | None:
    grid, (sharding,) = document["chunk_grid"], document["codecs"]
    names = _name_parts(document["chunk_key_encoding"])
    rows, *row = grid["configuration"]["chunk_shape"]
    inner = sharding["configuration"]
    (to_bytes, *steps), (index_bytes, *index_steps) = inner["codecs"], inner["index_codecs"]
    known = (
        (grid["name"], sharding["name"]) == ("regular", "sharding_indexed")
        and not document.get("storage_transformers")
        and tuple(row) == layout.shape[1:]
        and tuple(inner["chunk_shape"]) == (1, *layout.shape[1:])
        and (isinstance(rows, int) and rows >= 1)
        and all(_is_plain(one, layout) for one in (to_bytes, index_bytes))
        and inner["index_location"] in ("start", "end")
        and [step["name"] for step in index_steps] in ([], ["crc32c"])
    )
    chain = [step["name"] for step in steps]
    compressor = chain.pop(0) if chain and chain[0] in COMPRESSORS else None
    if not known or names is None or chain not in ([], ["crc32c"]):
        return None
    return RowShards(
        rows=rows,
        compressor=compressor,
        sealed=bool(chain),
        index_sealed=bool(index_steps),
        index_at_end=inner["index_location"] == "end",
        name_parts=names,
    )


def _is_plain(codec: dict[str, Any], layout: ArrayLayout) -> bool:
    """Whether a codec writes numbers as they lie in memory; bytes need no order."""
    order = codec.get("configuration", _LITTLE if layout.dtype[0] == "|" else {})
    return codec["name"] == "bytes" and order in (_LITTLE, {})


def _name_parts(encoding: dict[str, Any]) -> tuple[str, str] | None:
    """Return what chunk names begin with and are separated by, None for what Zarr does not define."""
    default = {"default": "/", "v2": "."}.get(encoding["name"])
    separator = encoding.get("configuration", {}).get("separator", default)
    if default is None or separator not in (".", "/"):
        return None
    return (f"c{separator}" if encoding["name"] == "default" else ""), separator
