"""Looks at a store without reading its features: lazy dask and xarray views, and a summary.

Any Zarr reader opens the arrays without this module. What it adds: chunks as large as a shard
(readers take the inner chunk, one row, and make a task of each), names for the rows, and the
refusal of unfinished teachers. float16 overflows in sums: cast to float32 before a mean.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import xarray
import zarr

from store.layout import ArrayLayout
from store.reader import FeatureStore
from store.spec import FORMAT_VERSION
from store.teacher import VALID, is_teacher, missing_shards, read_marks, read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelSummary:
    """One feature array: `shape` of a row, bytes on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSummary:
    """One teacher; `coverage` is the share of rows committed, `quarantined` counts among them."""

    name: str
    finished: bool
    coverage: float
    quarantined: int | None
    shards: int
    rows_per_shard: int
    bytes: int
    levels: tuple[LevelSummary, ...]
    fingerprint: str
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSummary:
    """What a store holds; `quarantined` maps image ids to reasons, `bytes` are those on disk."""

    path: str
    format_version: int
    images: int
    views_per_image: int
    image_size: tuple[int, int]
    quarantined: dict[str, str]
    digest: str
    bytes: int
    teachers: tuple[TeacherSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return asdict(self)


def open_dask(path: str | Path, teacher: str, level: str) -> dask.array.Array:
    """Return a level (rows, H, W, C), or `global` (rows, C), as float16 in shard-sized chunks.

    Rows that are quarantined are zeros: mask them with `FeatureStore.valid`. Cast to float32
    before any reduction, float16 sums overflow.

    Raises:
        StoreError: unknown teacher or level, or a teacher that is not finished.
    """
    store = FeatureStore(path)
    layout = store.array(teacher, level)
    array = zarr.open_array(store.path / teacher / layout.path, mode="r")
    lazy: dask.array.Array = dask.array.from_zarr(  # type: ignore[no-untyped-call]
        array, chunks=layout.chunk
    )
    return lazy


def open_xarray(path: str | Path, teacher: str) -> xarray.Dataset:
    """Return a teacher's levels as lazy variables along `row`, with `image` and `valid` beside.

    The axes `y`, `x` and `channel` are shared where all levels agree on their size, otherwise each
    level has its own, such as `channel_stage_1`.

    Raises:
        StoreError: unknown teacher, or one that is not finished.
    """
    store = FeatureStore(path)
    layouts = {level: store.array(teacher, level) for level in store.levels(teacher)}
    views = store.views.views_per_image
    return xarray.Dataset(
        {
            level: (_dimensions(level, layouts), open_dask(path, teacher, level))
            for level in layouts
        },
        coords={
            "image": ("row", np.repeat(np.array(store.images.ids), views)),
            "view": ("row", np.tile(np.arange(views), len(store.images))),
            "valid": ("row", store.valid(teacher)),
        },
        attrs={"teacher": teacher, "fingerprint": store.teachers[teacher].fingerprint()},
    )


def _dimensions(level: str, layouts: dict[str, ArrayLayout]) -> tuple[str, ...]:
    sizes: dict[str, set[int]] = {}
    for layout in layouts.values():
        for name, size in zip(layout.dimensions, layout.shape, strict=True):
            sizes.setdefault(name, set()).add(size)
    names = layouts[level].dimensions
    return tuple(name if len(sizes[name]) == 1 else f"{name}_{level}" for name in names)


def summarise(path: str | Path) -> StoreSummary:
    """Return what a store holds, finished or not, from metadata and file sizes only.

    Raises:
        StoreError: there is no store, or it cannot be trusted.
    """
    store = FeatureStore(path)
    images = store.images
    folders = (folder for folder in sorted(store.path.iterdir()) if is_teacher(folder))
    return StoreSummary(
        path=str(store.path),
        format_version=FORMAT_VERSION,
        images=len(images),
        views_per_image=store.views.views_per_image,
        image_size=store.views.image_size,
        quarantined={
            name: status
            for name, status in zip(images.ids, images.statuses, strict=True)
            if status != "ok"
        },
        digest=store.digest(),
        bytes=_folder_bytes(store.path),
        teachers=tuple(_summarise_teacher(folder, store) for folder in folders),
    )


def _summarise_teacher(folder: Path, store: FeatureStore) -> TeacherSummary:
    record = read_record(folder)
    unfinished = folder.name in store.unfinished
    layout = record.layout
    missing = missing_shards(folder, layout)
    absent = sum(len(layout.shard_rows(shard)) for shard in missing)
    marks = read_marks(folder, layout) if record.finished and not missing else None
    return TeacherSummary(
        name=folder.name,
        finished=not unfinished,
        coverage=(record.rows - absent) / (store.rows if unfinished else record.rows),
        quarantined=None if marks is None else int(np.count_nonzero(marks != VALID)),
        shards=layout.shards,
        rows_per_shard=record.rows_per_shard,
        bytes=_folder_bytes(folder),
        levels=tuple(
            LevelSummary(
                name=name,
                shape=array.shape[1:],
                dtype="float16",
                bytes=_folder_bytes(folder / array.path),
            )
            for name, array in layout.features().items()
        ),
        fingerprint=record.spec.fingerprint(),
        provenance=dict(record.spec.provenance),
    )


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
