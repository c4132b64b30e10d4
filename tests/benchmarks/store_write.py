"""Speed of the write path against plain file writes and fsync of the same bytes, side by side.

    python tests/benchmarks/store_write.py [--rounds 5] [--json]

A teacher like a ViT-B (four levels of 28 x 36 tokens, 768 channels) and one like a MobileNetV2
(four levels of growing width) answer in batches of 8, for one shard of 400 MB (the default shard is
larger: 256 MiB of each array); every round writes through
`FeatureWriter.write_codes` (checks, checksums, digest, fsync, commit), then the same
bytes as plain files, and the ratio is that of one round. Beside it stands the speed of what comes before, where the
features are: encoding, and the statistics of what a reader will get, on the processor by one
thread, as float32 features per second. Also reports the peak
memory of writing 64 and 256 rows, which must not differ by more than the allocator's noise.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.extract.encode import Encoder
from stages.extract.teachers import Features
from stages.memory import keep_freed_memory
from store.calibration import Calibration
from store.create import create_store
from store.reader import FeatureStore
from store.spec import LevelSpec, TeacherSpec
from store.testing import sample_images, sample_views
from store.writer import FeatureWriter

BATCH = 8
TEACHERS = {
    "ViT-B": [("block_02", (28, 36), 768), ("block_05", (28, 36), 768),
              ("block_08", (28, 36), 768), ("block_11", (28, 36), 768)],
    "MobileNetV2": [("stage_1", (112, 144), 24), ("stage_2", (56, 72), 32),
                    ("stage_3", (28, 36), 96), ("stage_4", (14, 18), 320)],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=400, help="of the shard that is written")
    parser.add_argument("--codecs", nargs="+", default=["float16", "float32", "int8", "pca-4bit"])
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", nargs=3, metavar=("TEACHER", "CODEC", "ROWS"))
    arguments = parser.parse_args()
    keep_freed_memory()  # as `sak` does
    if arguments.memory:
        teacher, codec, rows = arguments.memory
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            write(Path(folder) / "store", spec_of(teacher, codec), int(rows))
        status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's
        print(next(int(line.split()[1]) // 1024 for line in status.splitlines() if "VmHWM" in line))
        return
    results = [
        measure(teacher, codec, arguments) for teacher in TEACHERS for codec in arguments.codecs
    ]
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print(
        "| teacher | codec | bytes written | plain MB/s | ours MB/s | ratio (range) | encoded and summed, float32 MB/s | peak MiB, 64 rows | 256 rows |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for one in results:
        print(
            f"| {one['teacher']} | {one['codec']} | {one['bytes'] / 1e6:.0f} MB "
            f"| {one['plain']:.0f} | {one['ours']:.0f} "
            f"| {one['ratio']:.2f} ({one['lowest']:.2f} to {one['highest']:.2f}) "
            f"| {one['encode']:.0f} | {one['memory'][0]} | {one['memory'][1]} |"
        )


def measure(teacher: str, codec: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the speeds of both ways of writing."""
    spec = spec_of(teacher, codec)
    plain, ours, encode, size = [], [], [], 0
    rows = shard_rows(spec, arguments.megabytes)
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            seconds, encoding = write(folder / "store", spec, rows)
            encode.append(encoding)
            files = [
                path for path in (folder / "store").rglob("c.*") if path.stat().st_size > 2**20
            ]
            data = [path.read_bytes() for path in files]
            size = sum(map(len, data))
            shutil.rmtree(folder / "store")
            plain.append(size / 1e6 / write_plainly(folder, data, rows))
            ours.append(size / 1e6 / seconds)
    ratios = [fast / slow for fast, slow in zip(ours, plain, strict=True)]
    values = sum(height * width * channels for _, (height, width), channels in TEACHERS[teacher])
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(arguments.folder),
        "--memory",
        teacher,
        codec,
    ]
    memory = [
        int(subprocess.run([*command, count], check=True, capture_output=True, text=True).stdout)
        for count in ("64", "256")
    ]
    return {
        "teacher": teacher,
        "codec": codec,
        "bytes": size,
        "plain": statistics.median(plain),
        "ours": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "encode": values * 4 * rows / 1e6 / statistics.median(encode),
        "memory": memory,
    }


def spec_of(teacher: str, codec: str) -> TeacherSpec:
    """Return a teacher of these levels without a pooled output."""
    levels = tuple(
        LevelSpec(name=name, grid=grid, channels=channels)
        for name, grid, channels in TEACHERS[teacher]
    )
    return TeacherSpec(name="teacher", levels=levels, provenance={}, codec=codec)


def shard_rows(spec: TeacherSpec, megabytes: int) -> int:
    """Return how many rows, a multiple of the batch, have so many megabytes as stored."""
    bits = {"float32": 32, "float16": 16, "int8": 8}.get(spec.codec) or int(spec.codec[4])
    values = sum(level.grid[0] * level.grid[1] * level.channels for level in spec.levels)
    return round(megabytes * 1e6 / (values * bits / 8) / BATCH) * BATCH


def answers(spec: TeacherSpec, rows: int) -> dict[str, np.ndarray]:
    """Return features of one batch; every batch is the same, making them costs no time."""
    generator = np.random.default_rng(0)
    return {
        level.name: generator.standard_normal((rows, *level.grid, level.channels), np.float32)
        for level in spec.levels
    }


def write(path: Path, spec: TeacherSpec, rows: int) -> tuple[float, float]:
    """Write a store of as many rows in one shard; return the seconds of writing and of encoding."""
    create_store(path, sample_images(rows), sample_views(rows))
    batch = answers(spec, BATCH)

    def calibrate() -> dict[str, Any]:
        calibration = Calibration(spec, BATCH)
        for row in range(BATCH):
            calibration.add({name: level[row] for name, level in batch.items()}, held_out=row == 1)
        return calibration.fit(spec.codec)

    valid = np.ones(BATCH, bool)
    levels = {name: torch.from_numpy(level) for name, level in batch.items()}
    features = Features(levels=levels, pooled=None)
    with FeatureWriter.open(path, spec, 2**40, calibrate=calibrate) as writer:
        encoder = Encoder(writer.layout, writer.codecs)
        encoded = encoder(features, valid)  # the first call is slower than all others
        started = time.perf_counter()
        encoded = encoder(features, valid)
        encoding = (time.perf_counter() - started) * rows / BATCH
        os.sync()
        started = time.perf_counter()
        for start in range(0, rows, BATCH):
            part = range(start, start + BATCH)
            writer.write_codes(part, encoded.codes, encoded.moments, valid)
        writer.finish()
        seconds = time.perf_counter() - started
    assert FeatureStore(path).rows == rows
    return seconds, encoding


def write_plainly(folder: Path, data: list[bytes], rows: int) -> float:
    """Write as many files of the same size, in turn, in pieces of a batch, then fsync each."""
    os.sync()
    started = time.perf_counter()
    files = [(folder / f"plain_{index}").open("wb", buffering=0) for index in range(len(data))]
    pieces = rows // BATCH
    for piece in range(pieces):
        for file, content in zip(files, data, strict=True):
            edge = -(-len(content) // pieces)
            file.write(memoryview(content)[piece * edge : (piece + 1) * edge])
    for file in files:
        os.fsync(file.fileno())
        file.close()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
