"""What a store costs at scale: files and bytes counted from the format, times measured.

    python tests/benchmarks/shard_costs.py count            files, folders and bytes, nothing written
    python tests/benchmarks/shard_costs.py write FOLDER     one shard per codec
    python tests/benchmarks/shard_costs.py open FOLDER      stores of 10, 100 and 1,000 shards
    python tests/benchmarks/shard_costs.py tables FOLDER N  tables of N images

Each prints Markdown; times are wall milliseconds (CPU milliseconds). Counts come from `TeacherLayout`, with codecs that were
not fitted: their extents are the same. FOLDER must not exist and is left behind; it should lie on the disk in question.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from stages.extract.encode import Encoder
from stages.extract.teachers import Features
from store.calibration import Fidelity, FittedTarget
from store.codecs import BitCodec, Codec, Int8Codec, parse_codec
from store.create import create_store
from store.documents import encode_document
from store.images import ImageTable, ViewTable
from store.layout import METADATA, ArrayLayout, group_document
from store.pending import merge_shards
from store.reader import FeatureStore
from store.shard import ShardWriter
from store.spec import LevelSpec, TeacherSpec
from store.stored_codecs import describe_codec
from store.teacher import TeacherRecord, missing_shards, read_record
from store.teacher_layout import (
    StoredCodec,
    TeacherLayout,
    codec_layouts,
    with_rows_per_shard,
)
from store.testing import sample_images, sample_teacher, sample_views, write_rows
from store.writer import FeatureWriter

CODECS = ("float16", "int8", "pca-4bit", "pca-2bit")
SHARD_BYTES = 256 * 2**20
TEACHERS = 3
IMAGENET, HUNDRED_MILLION = 1_281_167, 100_000_000
BLOCKS = tuple(f"block_{index:02d}" for index in (2, 5, 8, 11))


def vit(grid: int, *coarser: int) -> tuple[LevelSpec, ...]:
    """Four blocks of 768 channels, a square grid, and coarser grids beside it."""
    stored = tuple((side, side) for side in (grid, *coarser))
    return tuple(
        LevelSpec(name=name, grid=(grid, grid), channels=768, stored=stored) for name in BLOCKS
    )


CASES = {
    "24 x 24": vit(24),
    "12 x 12": vit(12),
    "24 x 24, 12 x 12 and 6 x 6": vit(24, 12, 6),
    "native, four stages": tuple(
        LevelSpec(name=f"stage_{index}", grid=(96 >> index, 96 >> index), channels=96 << index)
        for index in range(4)
    ),
}
"""Levels of a teacher; the last is a hierarchical network at 384 pixels, as it answers."""


def teacher(levels: tuple[LevelSpec, ...], codec: str) -> TeacherSpec:
    return TeacherSpec(
        name="teacher_1", levels=levels, global_channels=768, codec=codec,
        provenance={"source": "timm:some_model.some_tag", "weights_sha256": "ab" * 32},
    )  # fmt: skip


def noise(spec: TeacherSpec, rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        level.name: random.standard_normal((rows, *level.grid, level.channels), np.float32)
        for level in spec.levels
    }


def untrained(spec: TeacherSpec) -> dict[str, FittedTarget]:
    """Return codecs of the right extents that were fitted to nothing, every component kept."""
    known = Fidelity(cosine_mean=0.0, cosine_p01=0.0, relative_l2=0.0)
    return {
        target.name: FittedTarget(
            codec=untrained_codec(spec.codec, target.channels), fidelity=known
        )
        for target in spec.targets
    }


def untrained_codec(name: str, channels: int) -> Codec:
    bits = parse_codec(name).bits
    if bits is None:
        return Int8Codec(
            scale=np.full(channels, 3e-4, np.float32), offset=np.zeros(channels, np.float32)
        )
    each, entries = np.arange(channels), 2**bits
    return BitCodec(
        block=np.array(1, np.int32),
        rotation=np.eye(channels, dtype=np.float16),
        mean=np.zeros(channels, np.float32),
        byte=(each * bits // 8).astype(np.int32),
        shift=(each * bits % 8).astype(np.uint8),
        mask=np.full(channels, entries - 1, np.uint8),
        first=(each * entries).astype(np.int32),
        table=np.tile(np.linspace(-0.5, 0.5, entries, dtype=np.float32), channels),
    )


@cache
def describe(case: str, codec: str) -> dict[str, StoredCodec]:
    """Return what the teacher of a case says of its codecs."""
    spec = teacher(CASES[case], codec)
    fitted = {} if parse_codec(codec).is_float else untrained(spec)
    return {
        target.name: describe_codec(codec, target, fitted[target.name])
        for target in spec.targets
        if fitted
    }


def layout_of(case: str, codec: str, rows: int) -> TeacherLayout:
    spec, codecs = teacher(CASES[case], codec), describe(case, codec)
    whole = TeacherLayout(spec=spec, rows=rows, rows_per_shard=1, codecs=codecs)
    return with_rows_per_shard(whole, SHARD_BYTES)


def array_bytes(array: ArrayLayout) -> int:
    return (array.files - 1) * array.file_bytes(0) + array.file_bytes(array.files - 1)


def small_arrays(layout: TeacherLayout) -> list[ArrayLayout]:
    """Return the arrays whose size does not grow with the rows: statistics and codecs."""
    arrays = []
    for target in layout.spec.targets:
        arrays += layout.statistics(target).values()
        if target.name in layout.codecs:
            arrays += codec_layouts(target, layout.codecs[target.name]).values()
    return arrays


def teacher_record(layout: TeacherLayout) -> TeacherRecord:
    return TeacherRecord(
        spec=layout.spec, rows=layout.rows, rows_per_shard=layout.rows_per_shard,
        images_digest="0" * 64, views_digest="0" * 64, finished=True, codecs=layout.codecs,
    )  # fmt: skip


def count(layout: TeacherLayout) -> dict[str, int]:
    """Return files, folders and bytes of one teacher, and what part of them is what."""
    features = list(layout.features().values())
    commits = [*layout.commits(), layout.valid()]
    fixed = small_arrays(layout)
    record = group_document(teacher_record(layout).to_attributes())
    documents = {**layout.documents(), **layout.statistics_documents(), METADATA: record}
    metadata = sum(len(encode_document(document)) for document in documents.values())
    arrays = [*features, *commits, *fixed]
    return {
        "shards": layout.shards,
        "rows per shard": layout.rows_per_shard,
        "files": sum(array.files for array in arrays) + len(documents) + 1,  # the lock
        "folders": len({str(Path(path).parent) for path in documents}),
        "bytes": sum(map(array_bytes, arrays)) + metadata,
        "index": sum(array.files * (16 * array.chunk[0] + 4) for array in features),
        "commit": sum(map(array_bytes, commits)),
        "fixed": sum(map(array_bytes, fixed)) + metadata,
    }


def print_counts() -> None:
    print(
        "| grids | codec | rows per shard | TB | shards | files | files per TB | index | commits "
        "| fixed |"
    )
    print("|---" * 10 + "|")
    for images in (IMAGENET, HUNDRED_MILLION):
        for name in CASES:
            for codec in CODECS:
                layout = layout_of(name, codec, images)
                one = count(layout)
                terabytes, files = TEACHERS * one["bytes"] / 1e12, TEACHERS * one["files"]
                print(
                    f"| {images / 1e6:.2f} M, {name} | {codec} | {one['rows per shard']:,} | "
                    f"{terabytes:,.2f} | {TEACHERS * one['shards']:,} | {files:,} | "
                    f"{files / terabytes:,.0f} | "
                    f"{one['index'] / one['bytes']:.4%} | {one['commit'] / one['bytes']:.4%} | "
                    f"{TEACHERS * one['fixed'] / 1e6:,.1f} MB |",
                    flush=True,
                )


class Times:
    """Adds up wall and CPU seconds of steps; on a busy machine the CPU's are the truer ones."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[float, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        wall, used = time.perf_counter(), time.process_time()
        yield
        before = self.steps.get(name, (0.0, 0.0))
        self.steps[name] = (
            before[0] + time.perf_counter() - wall, before[1] + time.process_time() - used,
        )  # fmt: skip

    def milliseconds(self, name: str, over: int = 1, digits: int = 1) -> str:
        """Return wall and CPU time as text, divided by `over`."""
        wall, used = (1e3 * seconds / over for seconds in self.steps[name])
        return f"{wall:,.{digits}f} ({used:,.{digits}f})"


class TimedShard(ShardWriter):
    """A shard writer that adds up how long sealing takes."""

    times: Times

    def seal(self) -> bytes:
        with self.times.step("seal"):
            return super().seal()


def images_of(count: int) -> ImageTable:
    """Return a table like ImageNet's."""
    return ImageTable(
        ids=tuple(f"train/n{index // 1300:08d}/n{index // 1300:08d}_{index}" for index in range(count)),
        sha256=tuple(f"{index:064x}" for index in range(1, count + 1)),
        heights=(375,) * count,
        widths=(500,) * count,
        statuses=("ok",) * count,
    )  # fmt: skip


def views_of(count: int) -> ViewTable:
    return ViewTable(
        image_size=(384, 384),
        boxes=np.tile(np.array([0, 62, 375, 375], np.float32), (count, 1)),
        flips=np.zeros(count, bool),
        seeds=np.zeros(count, np.uint64),
    )


def print_writing(folder: Path) -> None:
    from store import pending

    pending.ShardWriter = TimedShard  # type: ignore[misc]
    print("| grid | codec | rows | MB | encode and write, per row | begin | seal and fsync, "
          "summed over five arrays | whole commit |")  # fmt: skip
    print("|---" * 8 + "|")
    for name, rows, codecs in (("12 x 12", 64, CODECS), ("24 x 24", 303, ("float16",))):
        for codec in codecs:
            spec = teacher(CASES[name], codec)
            fitted = {} if codec == "float16" else untrained(spec)
            path = folder / f"{rows}-{codec}"
            create_store(path, images_of(rows), views_of(rows))
            with FeatureWriter.open(
                path, spec, 2**40, calibrate=lambda fitted=fitted: fitted
            ) as writer:
                print_shard(writer, spec, f"{name} | {codec}", rows)


def print_shard(writer: FeatureWriter, spec: TeacherSpec, label: str, rows: int) -> None:
    times = Times()
    TimedShard.times = times
    part = 16
    values, pooled = noise(spec, part), np.ones((part, 768), np.float32)
    with times.step("begin"):
        writer._turn(range(1))
    shard = writer._pending
    assert shard is not None
    encoder = Encoder(writer.layout, writer.codecs)
    for start in range(0, rows, part):
        valid = np.ones(min(part, rows - start), bool)
        levels = {key: torch.from_numpy(value[: len(valid)]) for key, value in values.items()}
        features = Features(levels=levels, pooled=torch.from_numpy(pooled[: len(valid)]))
        with times.step("append"):
            encoded = encoder(features, valid)
            shard.append(encoded.codes, encoded.moments, valid)
    with times.step("commit"):
        shard.commit()
    megabytes = writer.row_bytes * rows / 1e6
    append, begin, seal, commit = (
        times.milliseconds("append", rows, 2),
        *(times.milliseconds(name) for name in ("begin", "seal", "commit")),
    )
    print(f"| {label} | {rows} | {megabytes:.0f} | {append} | {begin} | {seal} | {commit} |", flush=True)  # fmt: skip


def print_opening(folder: Path) -> None:
    print("| shards | inodes | write, per shard | open | row marks | shards missing (resume) | "
          "merge statistics |")  # fmt: skip
    print("|---" * 7 + "|")
    spec = sample_teacher()
    for shards in (10, 100, 1000):
        path = folder / str(shards)
        create_store(path, sample_images(2 * shards), sample_views(2 * shards))
        times = Times()
        with FeatureWriter.open(path, spec, 2 * 2 * 3 * 4 * 6) as writer:
            for rows in writer.missing():
                with times.step("write"):
                    write_rows(writer, spec, rows)
            with times.step("finish"):
                writer.finish()
        with times.step("open"):
            store = FeatureStore(path)
        with times.step("marks"):
            store.valid(spec.name)
        layout = read_record(path / spec.name).layout
        with times.step("missing"):
            assert not missing_shards(path / spec.name, layout)
        with times.step("merge"):
            merge_shards(path / spec.name, layout)
        inodes = sum(1 for _ in path.rglob("*"))
        cells = [times.milliseconds(name) for name in ("open", "marks", "missing", "merge")]
        print(f"| {layout.shards:,} | {inodes:,} | {times.milliseconds('write', shards)} | "
              + " | ".join(cells) + " |", flush=True)  # fmt: skip


def print_tables(folder: Path, count: int) -> None:
    def memory() -> str:
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"

    times = Times()
    path = folder / str(count)
    if not path.exists():
        with times.step("build the table in memory (with its checks)"):
            images, views = images_of(count), views_of(count)
        with times.step("digest of the table"):
            images.digest()
        with times.step("`create_store`, the digest included"):
            create_store(path, images, views)
    with times.step("`FeatureStore(path)`"):
        store = FeatureStore(path)
    with times.step("read `images`, digest checked"):
        store.images  # noqa: B018
    with times.step("read `views`, digest checked"):
        store.views  # noqa: B018
    with times.step("first `row(id)`"):
        store.row(store.images.ids[-1])
    print(f"\n| {count:,} images | seconds | microseconds per image |\n|---|---|---|")
    for name, (wall, used) in times.steps.items():
        per_image = 1e6 / count
        print(
            f"| {name} | {wall:.2f} ({used:.2f}) | {wall * per_image:.1f} ({used * per_image:.1f}) |"
        )
    files = [entry for entry in path.rglob("*") if entry.is_file()]
    print(f"| peak memory of the process | {memory()} | |")
    print(
        f"| files and bytes | {len(files):,}, {sum(f.stat().st_size for f in files) / 1e6:.0f} MB | |"
    )
    widths = {}
    for group in ("images", "views"):
        for entry in (path / group).iterdir():
            if entry.is_dir():
                shape = json.loads((entry / METADATA).read_text())["shape"]
                widths[f"{group}/{entry.name}"] = -(-HUNDRED_MILLION // 65_536) if shape else 0
    print(f"| files for 100 M images | {sum(widths.values()) + len(widths) + 3:,} | |")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["count"]:
            print_counts()
        case ["write", folder]:
            Path(folder).mkdir()
            print_writing(Path(folder))
        case ["open", folder]:
            Path(folder).mkdir()
            print_opening(Path(folder))
        case ["tables", folder, count]:
            Path(folder).mkdir(exist_ok=True)
            print_tables(Path(folder), int(count))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
