"""Speed of reading rows in random order, against other ways to store and read the same rows.

    python tests/benchmarks/reading.py [--rounds 15] [--rows 48] [--folder DIR] [--json]

float16: rows of twelve levels in turn, 576 x 768 values each, one process, the page cache warm. A
memory-mapped numpy file, copied row by row into a buffer by one thread, is the measure; beside it
`FeatureStore.read_codes_into`, by one thread and by as many as it takes by itself, and the other
formats, each as its own documentation advises for random access (LitData and WebDataset in their
own order, which is what they are made for). All fill the same buffer with the same rows in one
round, in drawn order; a ratio is that of one round. Before that everybody reads every row twice:
what is mapped is then in the page tables (numpy's map after its first pass, the store's after its
second, as the first compares checksums). For the fairest ratio, numpy's copies are shared between
threads as well.

int8: codes of 28 x 36 tokens, 768 channels, read and decoded to float32 into a buffer, against
numpy's dequantising of the same codes, which lie in memory, by the same formula
(`codes * abs(codes) * scale + offset` in place, row by row or all at once) and against the
cheapest formula there is (`codes * scale`).

What is not installed is named and left out: pip install h5py webdataset litdata tensorstore.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import reading_formats as formats
from reading_formats import BATCH, CHANNELS, GRID, LEVELS, Read, expected

from store.calibration import Calibration
from store.reader import FeatureStore
from store.spec import LevelSpec, TeacherSpec
from store.testing import sample_images, sample_views
from store.threads import usual_threads
from store.writer import FeatureWriter, create_store

CODED_GRID = (28, 36)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=48, help="of twelve levels, 10.6 MB each")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = {
            "float16": measure_floats(Path(folder), arguments.rows, arguments.rounds),
            "int8": measure_codes(Path(folder) / "codes", arguments.rows, arguments.rounds),
        }
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, table in found.items():
        one, usual = list(table["speeds"])[:2]
        print(f"\n| {name} | GB/s (range) | {one} over it | {usual} over it |\n|---|---|---|---|")
        for reader, speeds in table["speeds"].items():
            ratios = " | ".join(
                spread([fast / slow for fast, slow in zip(ours, speeds, strict=True)])
                for ours in list(table["speeds"].values())[:2]
            )
            print(f"| {reader} | {spread(speeds)} | {ratios} |")
        for reader in table.get("missing", []):
            print(f"| {reader} | not measured: not installed | | |")


def spread(values: list[float]) -> str:
    """Return median, lowest and highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measure_floats(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Return the speed of each reader in each round, in GB of rows per second."""
    values = np.random.default_rng(0).normal(size=(16, *GRID, CHANNELS)).astype(np.float16)
    spec = teacher("float16", GRID, LEVELS)
    path = folder / "store"
    write_features(path, spec, values, rows)
    several = usual_threads()
    readers: dict[str, Read] = {
        "ours, one thread": partial(read_rows, FeatureStore(path), 1),
        f"ours, {several} threads": partial(read_rows, FeatureStore(path), several),
        "ours, one thread, every checksum compared": partial(
            read_rows, FeatureStore(path, "always"), 1
        ),
    }
    missing = []
    for name, module, make in formats.FORMATS:
        if find_spec(module) is None:
            missing.append(name)
        else:
            source = path if module in ("zarr", "tensorstore") else folder / module
            readers[name] = make(source, rows, values)
    out = np.zeros((LEVELS, BATCH, *GRID, CHANNELS), np.float16)
    for name, read in readers.items():  # warm, and right
        for batch in 2 * in_batches(np.arange(rows)):
            read(batch, out)
            np.testing.assert_array_equal(out, expected(values, batch), err_msg=name)
    generator = np.random.default_rng(1)
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        order = generator.permutation(rows)
        for name, read in readers.items():
            batches = in_batches(np.arange(rows) if "in order" in name else order)
            started = time.perf_counter()
            for batch in batches:
                read(batch, out)
            seconds = time.perf_counter() - started
            speeds[name].append(len(batches) * out.nbytes / seconds / 1e9)
    return {"speeds": speeds, "missing": missing}


def measure_codes(path: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Return the speed of each way to get float32 from codes, in GB of float32 per second."""
    values = np.random.default_rng(0).normal(size=(8, *CODED_GRID, CHANNELS)).astype(np.float32)
    spec = teacher("int8", CODED_GRID, 1)
    write_features(path, spec, values, rows)
    store = FeatureStore(path)
    codes = store.read_codes("teacher", "block_00", range(rows))
    fitted = store.codec("teacher", "block_00")
    scale, offset = fitted.codec.scale, fitted.codec.offset
    out = np.zeros((rows, *CODED_GRID, CHANNELS), np.float32)
    spare = np.zeros_like(out)
    several = usual_threads()
    order = np.random.default_rng(1).permutation(rows)

    def ours(threads: int) -> None:
        store.read_into("teacher", "block_00", order, out, threads=threads)

    def at_once() -> None:
        np.copyto(out, codes)
        np.multiply(out, np.abs(out, out=spare), out=out)
        np.multiply(out, scale, out=out)
        np.add(out, offset, out=out)

    def row_by_row() -> None:
        for row, one in zip(out, codes, strict=True):
            np.copyto(row, one)
            row *= np.abs(row, out=spare[0])
            row *= scale
            row += offset

    def even_steps() -> None:
        np.multiply(codes, scale, out=out)

    ways: dict[str, Callable[[], None]] = {
        "ours, one thread": partial(ours, 1),
        f"ours, {several} threads": partial(ours, several),
        "numpy, all rows at once": at_once,
        "numpy, row by row": row_by_row,
        "numpy, codes * scale alone": even_steps,
    }
    ours(1)
    at_once_of = out[np.argsort(order)].copy()
    row_by_row()
    np.testing.assert_allclose(at_once_of, out, rtol=1e-6, atol=1e-6)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            speeds[name].append(out.nbytes / (time.perf_counter() - started) / 1e9)
    return {"speeds": speeds}


def in_batches(rows: np.ndarray) -> list[np.ndarray]:
    """Return whole batches of rows."""
    return [rows[start : start + BATCH] for start in range(0, len(rows) - BATCH + 1, BATCH)]


def read_rows(store: FeatureStore, threads: int, rows: np.ndarray, out: np.ndarray) -> None:
    """Read every level of some rows."""
    for index, level in enumerate(out):
        store.read_codes_into("teacher", f"block_{index:02d}", rows, level, threads=threads)


def teacher(codec: str, grid: tuple[int, int], levels: int) -> TeacherSpec:
    """Return a teacher of equal levels without a pooled output."""
    names = [f"block_{index:02d}" for index in range(levels)]
    return TeacherSpec(
        name="teacher",
        codec=codec,
        levels=tuple(LevelSpec(name=name, grid=grid, channels=CHANNELS) for name in names),
        global_channels=None,
        provenance={},
    )


def write_features(path: Path, spec: TeacherSpec, values: np.ndarray, rows: int) -> None:
    """Write a store of as many rows, those that `expected` says."""
    create_store(path, sample_images(rows), sample_views(rows))
    names = [level.name for level in spec.levels]

    def calibrate() -> dict[str, Any]:
        calibration = Calibration(spec, len(values))
        for index, row in enumerate(values.astype(np.float32)):
            calibration.add(dict.fromkeys(names, row), held_out=index % 2 == 1)
        return calibration.fit(spec.codec)

    with FeatureWriter.open(path, spec, calibrate=calibrate) as writer:
        for shard in writer.missing():
            for row in shard:
                levels = expected(values, np.array([row]), len(names)).astype(np.float32)
                batch = dict(zip(names, levels, strict=True))
                writer.write(range(row, row + 1), batch, None, np.ones(1, bool))
        writer.finish()


if __name__ == "__main__":
    main()
