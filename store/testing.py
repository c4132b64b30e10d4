"""Small stores for tests, of this package and of whatever reads or writes one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.calibration import Calibration, FittedTarget
from store.create import create_store
from store.remote import StorePath
from store.spec import GLOBAL, ImageTable, LevelSpec, TeacherSpec, ViewTable
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
    pyramid: bool = False,
    **provenance: Any,
) -> TeacherSpec:
    """Return a hierarchical teacher of two levels, (3, 4) x 6 and (2, 2) x 8.

    With a pyramid, the first is stored at (2, 2) too, the second at (1, 1).
    """
    return TeacherSpec(
        name=name,
        levels=(
            LevelSpec(
                name="stage_1", grid=(3, 4), channels=6, stored=((3, 4), (2, 2)) if pyramid else ()
            ),
            LevelSpec(
                name="stage_2", grid=(2, 2), channels=8, stored=((2, 2), (1, 1)) if pyramid else ()
            ),
        ),
        global_channels=global_channels,
        codec=codec,
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


def sample_codecs(spec: TeacherSpec, first_row: int = 0) -> dict[str, FittedTarget]:
    """Return the teacher's codecs, fitted to five rows from `first_row` on."""
    calibration = Calibration(spec, 5)
    for row in range(first_row, first_row + 5):
        features = sample_features(spec, range(row, row + 1))
        calibration.add({name: rows[0] for name, rows in features.items()}, held_out=row % 2 == 1)
    return calibration.fit(spec.codec)


def sample_shard_bytes(spec: TeacherSpec, rows_per_shard: int) -> int:
    """Return the `shard_bytes` that makes shards of so many rows."""
    return 2 * rows_per_shard * max(lv.grid[0] * lv.grid[1] * lv.channels for lv in spec.levels)


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
        path, spec, size, covariance=covariance, calibrate=lambda: sample_codecs(spec)
    ) as writer:
        for shard in writer.missing():
            write_rows(writer, spec, shard, valid)
        writer.finish()
