"""Small stores for tests, of this package and of whatever reads or writes one."""

import os
import signal
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.calibration import Calibration, FittedTarget
from store.codecs import parse_codec
from store.create import create_store
from store.errors import StoreError, StoreFormatError
from store.images import ImageTable, ViewTable
from store.reader import FeatureStore
from store.remote import StorePath
from store.spec import GLOBAL, Grid, LevelSpec, TeacherSpec
from store.stored_codecs import describe_codec
from store.teacher_layout import TeacherLayout
from store.verify import verify
from store.writer import FeatureWriter


def sample_images(count: int, quarantined: Sequence[int] = ()) -> ImageTable:
    """Return `count` images of 480 x 640 with ids such as `room/0003-é`."""
    return ImageTable(
        ids=tuple(f"room/{index:04d}-é" for index in range(count)),
        sha256=tuple(f"{index:064x}" if index else "" for index in range(count)),
        heights=(480,) * count,
        widths=(640,) * count,
        statuses=tuple("zero bytes" if i in quarantined else "ok" for i in range(count)),
    )


def sample_views(rows: int, views_per_image: int = 1) -> ViewTable:
    """Return whole-image views of 24 x 32 pixels."""
    return ViewTable(
        image_size=(24, 32),
        boxes=np.tile(np.array([0, 0, 480, 640], np.float32), (rows, 1)),
        flips=np.zeros(rows, bool),
        seeds=np.arange(rows, dtype=np.uint64),
        views_per_image=views_per_image,
    )


def sample_teacher(
    name: str = "small",
    *,
    global_channels: int | None = 5,
    codec: str = "float16",
    stored: tuple[Grid, ...] = (),
    pyramid: bool = False,
    **provenance: Any,
) -> TeacherSpec:
    """Return a hierarchical teacher of two levels, (3, 4) x 6, kept as `stored`, and (2, 2) x 8.

    With a pyramid, the first is stored at (2, 2) too, the second at (1, 1).
    """
    return TeacherSpec(
        name=name,
        codec=codec,
        levels=(
            LevelSpec(
                name="stage_1",
                grid=(3, 4),
                channels=6,
                stored=((3, 4), (2, 2)) if pyramid else stored,
            ),
            LevelSpec(
                name="stage_2", grid=(2, 2), channels=8, stored=((2, 2), (1, 1)) if pyramid else ()
            ),
        ),
        global_channels=global_channels,
        provenance={"model": name, "weights_sha256": "ab" * 32, **provenance},
    )


def sample_features(spec: TeacherSpec, rows: range) -> dict[str, NDArray[np.float32]]:
    """Return features (n, H, W, C) by level, and (n, C) for `global`, that depend on the row."""
    shapes: dict[str, tuple[int, ...]] = {
        level.name: (*level.grid, level.channels) for level in spec.levels
    }
    if spec.global_channels is not None:
        shapes[GLOBAL] = (spec.global_channels,)
    return {
        name: np.stack(
            [
                np.random.default_rng([row, index]).normal(3, 2, shape).astype(np.float32)
                for row in rows
            ]
        )
        for index, (name, shape) in enumerate(shapes.items())
    }


def sample_codecs(spec: TeacherSpec, rows: int = 8, first_row: int = 0) -> dict[str, FittedTarget]:
    """Return the codecs of a teacher, fitted to one half of `rows` sample features."""
    calibration = Calibration(spec, rows)
    for row in range(first_row, first_row + rows):
        features = sample_features(spec, range(row, row + 1))
        calibration.add(
            {name: values[0] for name, values in features.items()}, held_out=row % 2 == 1
        )
    return calibration.fit(spec.codec)


def sample_shard_bytes(spec: TeacherSpec, rows_per_shard: int) -> int:
    """Return the `shard_bytes` that makes shards of so many rows."""
    codecs = {}
    if not parse_codec(spec.codec).is_float:
        fitted = sample_codecs(spec)
        codecs = {
            target.name: describe_codec(spec.codec, target, fitted[target.name])
            for target in spec.targets
        }
    layout = TeacherLayout(spec=spec, rows=1, rows_per_shard=1, codecs=codecs)
    sizes = [array.row_bytes for array in layout.features().values()]
    return -(-rows_per_shard * sum(sizes) // len(sizes))


def write_rows(
    writer: FeatureWriter, spec: TeacherSpec, rows: range, valid: NDArray[np.bool_] | None = None
) -> None:
    """Write the sample features of `rows`; `valid` is of all rows of the store."""
    features = sample_features(spec, rows)
    pooled = features.pop(GLOBAL, None)
    good = np.ones(len(rows), bool) if valid is None else valid[rows.start : rows.stop]
    writer.write(rows, features, pooled, good)


def write_store(
    path: str | StorePath,
    images: ImageTable,
    spec: TeacherSpec,
    *,
    rows_per_shard: int = 4,
    views_per_image: int = 1,
    covariance: bool = False,
) -> None:
    """Write a whole store with one finished teacher; quarantined images have no features."""
    rows = len(images) * views_per_image
    create_store(path, images, sample_views(rows, views_per_image))
    valid = np.repeat([status == "ok" for status in images.statuses], views_per_image)
    size = sample_shard_bytes(spec, rows_per_shard)
    with FeatureWriter.open(
        path, spec, size, covariance=covariance, calibrate=lambda: sample_codecs(spec, 64)
    ) as writer:
        for shard in writer.missing():
            write_rows(writer, spec, shard, valid)
        writer.finish()


def read_everything(path: str | StorePath, teacher: str = "small") -> dict[str, NDArray[Any]]:
    """Return what readers may get of a finished teacher: features of valid rows, and statistics."""
    store = FeatureStore(path)
    assert len(store.images) * store.views.views_per_image == len(store.views)
    rows = np.flatnonzero(store.valid(teacher))
    values: dict[str, NDArray[Any]] = {"valid rows": rows}
    for level in store.levels(teacher):
        values[level] = store.read(teacher, level, rows)
    for target in store.teachers[teacher].targets:
        values[target.name] = store.read(teacher, target.level, rows, target.grid)
        statistics = store.statistics(teacher, target.level, target.grid)
        for part in ("mean", "variance", "covariance"):
            if getattr(statistics, part) is not None:  # a flipped letter of its key hides it
                values[f"{part} of {target.name}"] = getattr(statistics, part)
    return values


def flip_bits(
    folder: Path, per_file: int, generator: np.random.Generator
) -> Iterator[tuple[Path, int]]:
    """Flip one random bit after the other, `per_file` in every file below a folder.

    Yields the file and the byte's offset while the bit is flipped; the file is put right after.
    """
    for file in [file for file in sorted(folder.rglob("*")) if file.is_file()]:
        original = file.read_bytes()
        for position in generator.integers(0, len(original), per_file).tolist():
            flipped = bytearray(original)
            flipped[position] ^= 1 << int(generator.integers(8))
            file.write_bytes(flipped)
            try:
                yield file, position
            finally:
                file.write_bytes(original)


def refuse_every_flip(path: Path, below: Path, per_file: int) -> list[str]:
    """Flip bits of the files below a folder of the store at `path`; return each flip's file.

    Raises:
        AssertionError: a flip that `verify` calls clean, or that changes what a reader returns.
    """
    expected, flipped, unseen = read_everything(path), [], []
    for file, position in flip_bits(below, per_file, np.random.default_rng(1)):
        flipped.append(file.relative_to(path).as_posix())
        try:
            if verify(path).clean:
                unseen.append((flipped[-1], position))
        except StoreFormatError:
            pass  # refused on open
        try:
            for name, values in read_everything(path).items():
                np.testing.assert_array_equal(values, expected[name], err_msg=flipped[-1])
        except StoreError:
            pass
    assert unseen == []
    return flipped


def kill_at_call(number: int, names: Sequence[str]) -> None:
    """Have this process kill itself at the `number`-th call of any of these functions of `os`.

    A killed write is torn half way. fsync does nothing, it would only take time.
    """
    calls = 0

    def counted(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                if name == "writev":
                    data = b"".join(arguments[1])
                    real(arguments[0], [data[: len(data) // 2]])
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "fsync" else real(*arguments, **options)

        return call

    for name in names:
        setattr(os, name, counted(name))


KILL_LOOP = """
import os, shutil, sys
from pathlib import Path
folder = Path(sys.argv[1])
for number in range(1, 10_000, int(sys.argv[2])):
    path = folder / str(number) / "store"
    shutil.copytree(folder / "store", path)
    ends = []
    again = [1 + 7 * number % 61] * (number % 2)  # every other time the one who resumes is, too
    for kill_at in (number, *again):
        child = os.fork()
        if child == 0:
            kill_at_call(kill_at, ("writev", "fsync", "replace", "unlink", "rmdir", "mkdir"))
            run(path)
            os._exit(0)
        ends.append(os.waitpid(child, 0)[1])
    if ends[0] == 0:
        break
print(number)
"""
"""Ends a script that defines `run(path)`: kills it at every `argv[2]`-th call of the system, each
time on a copy of the store in the folder `argv[1]`, until it gets through; prints at which call."""


def file_contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by its path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its path in it."""
    return {name: sha256(data).hexdigest() for name, data in file_contents(folder).items()}
