"""The same rows in other formats, each written and read as its documentation advises.

A reader fills a buffer (levels, rows of a batch, H, W, C) with all levels of some rows. What is
read in order returns the next rows, whatever is asked for.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from store.threads import each_in_threads, usual_threads

GRID, CHANNELS = (24, 24), 768
LEVELS = 12
BATCH = 16
ROW = (*GRID, CHANNELS)

Read = Callable[[np.ndarray, np.ndarray], None]


def expected(values: np.ndarray, rows: np.ndarray, levels: int = LEVELS) -> np.ndarray:
    """Return (level, n, H, W, C) of rows (n,): which of a few drawn ones lies where."""
    return values[(rows * 5 + np.arange(levels)[:, None]) % len(values)]


def mapped_numpy(folder: Path, rows: int, values: np.ndarray, threads: int = 1) -> Read:
    """One array file for each level."""
    folder.mkdir(exist_ok=True)
    arrays = []
    for level in range(LEVELS):
        path = folder / f"{level}.npy"
        if not path.exists():
            np.save(path, expected(values, np.arange(rows))[level])
        arrays.append(np.load(path, mmap_mode="r"))

    def read(wanted: np.ndarray, out: np.ndarray) -> None:
        for array, level in zip(arrays, out, strict=True):

            def copy(place: int, array: np.ndarray = array, level: np.ndarray = level) -> None:
                level[place] = array[wanted[place]]

            each_in_threads(copy, range(len(wanted)), threads)

    return read


def mapped_numpy_shared(folder: Path, rows: int, values: np.ndarray) -> Read:
    """The same files, each copy shared by as many threads as the store takes."""
    return mapped_numpy(folder, rows, values, usual_threads())


def zarr_python(store: Path, rows: int, values: np.ndarray) -> Read:
    """The store itself, row by row."""
    import zarr

    arrays = [
        zarr.open_array(str(store), path=f"teacher/block_{level:02d}/native", mode="r")
        for level in range(LEVELS)
    ]

    def read(wanted: np.ndarray, out: np.ndarray) -> None:
        for array, level in zip(arrays, out, strict=True):
            for row, buffer in zip(wanted, level, strict=True):
                buffer[...] = array[int(row)]

    return read


def tensor_store(store: Path, rows: int, values: np.ndarray) -> Read:
    """The store itself, all rows of a batch asked for before the first is waited for."""
    import tensorstore

    arrays = [
        tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{store}/teacher/block_{level:02d}/native/"},
            },
            open=True,
            read=True,
        ).result()
        for level in range(LEVELS)
    ]

    def read(wanted: np.ndarray, out: np.ndarray) -> None:
        for array, level in zip(arrays, out, strict=True):
            asked = [array[int(row)].read() for row in wanted]
            for answer, buffer in zip(asked, level, strict=True):
                buffer[...] = answer.result()

    return read


def h5py_rows(folder: Path, rows: int, values: np.ndarray) -> Read:
    """One data set for each level, a chunk is a row; read straight into the buffer."""
    import h5py

    folder.mkdir()
    with h5py.File(folder / "rows.h5", "w") as file:
        for level in range(LEVELS):
            data = expected(values, np.arange(rows))[level]
            file.create_dataset(str(level), data=data, chunks=(1, *ROW))
    file = h5py.File(folder / "rows.h5", "r")
    arrays = [file[str(level)] for level in range(LEVELS)]

    def read(wanted: np.ndarray, out: np.ndarray) -> None:
        for array, level in zip(arrays, out, strict=True):
            for row, buffer in zip(wanted, level, strict=True):
                array.read_direct(buffer, int(row))

    return read


def web_dataset(folder: Path, rows: int, values: np.ndarray) -> Read:
    """One tar, a sample has the bytes of twelve levels."""
    import webdataset

    folder.mkdir()
    path = str(folder / "rows.tar")
    with webdataset.TarWriter(path) as tar:
        for row in range(rows):
            levels = expected(values, np.array([row]))[:, 0]
            parts = {f"{level:02d}.bin": part.tobytes() for level, part in enumerate(levels)}
            tar.write({"__key__": f"{row:06d}", **parts})

    def samples() -> Iterator[dict[str, Any]]:
        while True:
            yield from webdataset.WebDataset(path, shardshuffle=False)

    def parts_of(sample: dict[str, Any], level: int) -> np.ndarray:
        return np.frombuffer(sample[f"{level:02d}.bin"], np.float16).reshape(ROW)

    return _in_order(samples(), parts_of)


def lit_data(folder: Path, rows: int, values: np.ndarray) -> Read:
    """Chunks of 128 MiB, a sample is the list of twelve arrays."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=128 * 2**20)
    for row in range(rows):
        writer[row] = list(expected(values, np.array([row]))[:, 0])
    writer.done()
    writer.merge()

    def samples() -> Iterator[list[np.ndarray]]:
        dataset = StreamingDataset(str(folder), shuffle=False, max_cache_size="100GB")
        while True:
            yield from dataset

    return _in_order(samples(), lambda sample, level: sample[level])


def _in_order(samples: Iterator[Any], part: Callable[[Any, int], np.ndarray]) -> Read:
    def read(wanted: np.ndarray, out: np.ndarray) -> None:
        for index in range(len(wanted)):
            sample = next(samples)
            for level in range(LEVELS):
                out[level, index] = part(sample, level)

    return read


FORMATS: list[tuple[str, str, Callable[[Path, int, np.ndarray], Read]]] = [
    ("memory-mapped numpy, copied", "numpy", mapped_numpy),
    ("memory-mapped numpy, copied in threads", "numpy", mapped_numpy_shared),
    ("zarr-python, row by row", "zarr", zarr_python),
    ("tensorstore", "tensorstore", tensor_store),
    ("h5py", "h5py", h5py_rows),
    ("WebDataset, in order", "webdataset", web_dataset),
    ("LitData, in order", "litdata", lit_data),
]
"""What each is called, the module it needs, and what writes and opens it."""
