"""Small arrays: one checksummed chunk per file, read and written whole."""

from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from store.documents import check_document, write_document
from store.errors import StoreDamagedError
from store.files import read_file, write_file
from store.layout import CHECKSUM_BYTES, METADATA, ArrayLayout
from store.remote import StorePath, each


def checksum(data: bytes | NDArray[Any]) -> bytes:
    """Return the crc32c as Zarr stores it: four bytes, little-endian."""
    return int(google_crc32c.value(data)).to_bytes(CHECKSUM_BYTES, "little")


def write_chunk(folder: StorePath, layout: ArrayLayout, number: int, values: NDArray[Any]) -> None:
    """Place one chunk file of a small array; a short last chunk is padded with zeros."""
    chunk = np.zeros(layout.chunk, layout.dtype)
    chunk[tuple(slice(extent) for extent in values.shape)] = values
    data = chunk.tobytes()
    write_file(folder / layout.file_path(number), data + checksum(data))


def read_chunk(folder: StorePath, layout: ArrayLayout, number: int) -> NDArray[Any]:
    """Return one chunk of a small array, without its padding.

    Raises:
        StoreDamagedError: the file is missing, has another size or another checksum.
    """
    path = folder / layout.file_path(number)
    expected = layout.file_bytes(number)
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise StoreDamagedError(f"{path} is missing from the store") from error
    if size != expected:  # before reading, so that no document can make us allocate
        raise StoreDamagedError(f"{path} should have {expected} bytes, it has {size}")
    data = read_file(path)
    body = data[:-CHECKSUM_BYTES]
    if checksum(body) != data[-CHECKSUM_BYTES:]:
        raise StoreDamagedError(f"{path} is damaged: its checksum does not match")
    chunk = np.frombuffer(body, layout.dtype).reshape(layout.chunk)
    return chunk[: layout.file_rows(number)] if layout.shape else chunk


def write_array(folder: StorePath, layout: ArrayLayout, values: NDArray[Any]) -> None:
    """Place a small array, its metadata last."""
    for number in range(layout.files):
        start = number * layout.chunk[0] if layout.shape else 0
        part = values[start : start + layout.chunk[0]] if layout.shape else values
        write_chunk(folder, layout, number, part)
    write_document(folder / layout.path / METADATA, layout.document())


def read_array(folder: StorePath, layout: ArrayLayout) -> NDArray[Any]:
    """Return a small array after checking its metadata.

    Raises:
        StoreDamagedError: metadata or a chunk is not what the layout says.
    """
    check_document(folder / layout.path / METADATA, layout.document())
    chunks = each(folder, lambda number: read_chunk(folder, layout, number), range(layout.files))
    return np.concatenate(chunks) if layout.shape else chunks[0]
