"""Looks at a store without reading its features: lazy dask and xarray views, and a summary.

Any Zarr reader opens the arrays without this module. What it adds: chunks as large as a shard
(readers take the inner chunk, one row, and make a task of each), names for the rows, and the
refusal of unfinished teachers. float16 overflows in sums: cast to float32 before a mean.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import xarray

from store.calibration import Fidelity
from store.codecs import Codec, Codes, Values
from store.decode import decode_rows
from store.drift import LevelDrift, read_drift
from store.equivariance import Equivariance, read_equivariance
from store.reader import FeatureStore
from store.remote import StorePath
from store.spec import FORMAT_VERSION, Grid
from store.stored_codecs import read_codec
from store.teacher import (
    VALID,
    TeacherRecord,
    missing_shards,
    read_marks,
    read_record,
    teacher_folders,
)
from store.zarr_rows import open_zarr


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelSummary:
    """One feature array: `shape` of a row as read, bytes on disk and per row as stored.

    `fidelity` is what its codec keeps of tokens, None where floats are stored; `equivariance` the
    mean cosine of the native grid after `flip`, `crop` and `scale` with the true answer, None where
    it was not measured, NaN as None.
    """

    name: str
    shape: tuple[int, ...]
    codec: str
    row_bytes: int
    bytes: int
    fidelity: Fidelity | None
    equivariance: Mapping[str, float | None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSummary:
    """One teacher; `coverage` is the share of rows committed, `quarantined` counts among them.

    `drift` is how far low precision took each level from float32, empty where there was none.
    """

    name: str
    finished: bool
    coverage: float
    quarantined: int | None
    shards: int
    rows_per_shard: int
    bytes: int
    levels: tuple[LevelSummary, ...]
    equivariance_images: int
    drift: tuple[LevelDrift, ...]
    fingerprint: str
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSummary:
    """What a store holds; `quarantined` maps image ids to reasons, `bytes` are those on disk.

    `flipped` counts the rows of mirrored views; `photometric`: whether views change colours.
    """

    path: str
    format_version: int
    images: int
    views_per_image: int
    flipped: int
    photometric: bool
    image_size: tuple[int, int]
    quarantined: dict[str, str]
    digest: str
    bytes: int
    teachers: tuple[TeacherSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return asdict(self)


def open_dask(
    path: str | StorePath, teacher: str, level: str, resolution: Grid | None = None
) -> dask.array.Array:
    """Return a level (rows, H, W, C), or `global` (rows, C), decoded, in shard-sized chunks.

    Quarantined rows hold no features: mask them with `FeatureStore.valid`. Where float16 is stored,
    float16 comes: cast to float32 before any reduction, float16 sums overflow.

    Raises:
        StoreError: unknown teacher, level or resolution, or a teacher that is not finished.
    """
    store = FeatureStore(path)
    layout = store.array(teacher, level, resolution)
    array = open_zarr(store.path / teacher / layout.path)
    lazy: dask.array.Array = dask.array.from_zarr(  # type: ignore[no-untyped-call]
        array, chunks=layout.chunk
    )
    fitted = store.codec(teacher, level, resolution)
    if fitted is None:
        return lazy
    row = (*(resolution or store.grids(teacher, level)[0]), _channels(store, teacher, level))
    decoded: dask.array.Array = lazy.map_blocks(
        _decode,  # type: ignore[arg-type]
        fitted.codec,
        dtype=np.float32,
        chunks=(lazy.chunks[0], *((side,) for side in row)),
    )
    return decoded


def _decode(codes: Codes, codec: Codec) -> Values:
    return decode_rows(codec, codes)


def _channels(store: FeatureStore, teacher: str, level: str) -> int:
    levels = store.teachers[teacher].levels
    return next(entry.channels for entry in levels if entry.name == level)


def open_xarray(path: str | StorePath, teacher: str) -> xarray.Dataset:
    """Return a teacher's levels, each at its finest, as lazy variables along `row`.

    `image`, `view` and `valid` lie beside them. The axes `y`, `x` and `channel` are shared where
    all levels agree on their size, otherwise each level has its own, such as `channel_stage_1`.

    Raises:
        StoreError: unknown teacher, or one that is not finished.
    """
    store = FeatureStore(path)
    arrays = {level: open_dask(path, teacher, level) for level in store.levels(teacher)}
    views = store.views.views_per_image
    return xarray.Dataset(
        {level: (_dimensions(level, arrays), array) for level, array in arrays.items()},
        coords={
            "image": ("row", np.repeat(np.array(store.images.ids), views)),
            "view": ("row", np.tile(np.arange(views), len(store.images))),
            "valid": ("row", store.valid(teacher)),
        },
        attrs={"teacher": teacher, "fingerprint": store.teachers[teacher].fingerprint()},
    )


def _dimensions(level: str, arrays: Mapping[str, dask.array.Array]) -> tuple[str, ...]:
    sizes: dict[str, set[int]] = {}
    for array in arrays.values():
        for name, size in zip(_axes(array), array.shape, strict=True):
            sizes.setdefault(name, set()).add(size)
    return tuple(
        name if len(sizes[name]) == 1 else f"{name}_{level}" for name in _axes(arrays[level])
    )


def _axes(array: dask.array.Array) -> tuple[str, ...]:
    return ("row", "y", "x", "channel") if array.ndim == 4 else ("row", "channel")


def summarise(path: str | StorePath) -> StoreSummary:
    """Return what a store holds, finished or not, from metadata and file sizes only.

    Raises:
        StoreError: there is no store, or it cannot be trusted.
    """
    store = FeatureStore(path)
    images = store.images
    return StoreSummary(
        path=str(store.path),
        format_version=FORMAT_VERSION,
        images=len(images),
        views_per_image=store.views.views_per_image,
        flipped=int(np.count_nonzero(store.views.flips)),
        photometric=store.views.photometric is not None,
        image_size=store.views.image_size,
        quarantined={
            name: status
            for name, status in zip(images.ids, images.statuses, strict=True)
            if status != "ok"
        },
        digest=store.digest(),
        bytes=_folder_bytes(store.path),
        teachers=tuple(_summarise_teacher(folder, store) for folder in teacher_folders(store.path)),
    )


def _summarise_teacher(folder: StorePath, store: FeatureStore) -> TeacherSummary:
    record = read_record(folder)
    measured = read_equivariance(folder, record.spec)
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
            _summarise_array(folder, record, name, measured) for name in layout.features()
        ),
        equivariance_images=0 if measured is None else measured.images,
        drift=read_drift(folder, record.spec),
        fingerprint=record.spec.fingerprint(),
        provenance=dict(record.spec.provenance),
    )


def _summarise_array(
    folder: StorePath, record: TeacherRecord, name: str, measured: Equivariance | None
) -> LevelSummary:
    array = record.layout.features()[name]
    target = next((one for one in record.spec.targets if one.name == name), None)
    stored = record.codecs.get(name)
    fitted = None if stored is None or target is None else read_codec(folder, target, stored)
    return LevelSummary(
        name=name,
        shape=array.shape[1:] if target is None else (*target.grid, target.channels),
        codec=str(np.dtype(array.dtype)) if stored is None else stored.name,
        row_bytes=array.row_bytes,
        bytes=_folder_bytes(folder / array.path),
        fidelity=None if fitted is None else fitted.fidelity,
        equivariance=None if measured is None or target is None else {
            transform: None if np.isnan(cosine) else cosine
            for transform, cosine in measured.cosine[target.level].items()
        },
    )  # fmt: skip


def _folder_bytes(folder: StorePath) -> int:
    if not isinstance(folder, Path):  # a listing tells all sizes, asking for each is a request each
        return sum(
            int(entry["size"]) for entry in folder.fs.find(folder.path, detail=True).values()
        )
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
