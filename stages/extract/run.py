"""Extraction: one teacher's features of every image, into whatever the store still misses.

Letters: `B` batch, `C` channels, `h w` cells of a level's grid.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.data.sources import ImageSource
from stages.extract.calibrate import choose_rows, gather
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.drift import LevelDrift, measure_drift
from stages.extract.errors import ExtractionError, NonFiniteFeaturesError
from stages.extract.reading import RowReader, read_ahead
from stages.extract.teachers import Features, Teacher, choose_device, load_teacher
from stages.progress import Progress
from store.calibration import FittedTarget
from store.reader import FeatureStore
from store.remote import StorePath
from store.writer import FeatureWriter

_BATCHES_AHEAD = 2
_SHOWN = 5

_Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractSummary:
    """What a run did; images, bytes and seconds are this run's, without what was there before.

    `images` went through the teacher in `seconds`, loading it not counted; `quarantined` rows have
    no features; `already_there` are rows of shards committed before; `bytes_written` are features
    as stored, without checksums.
    """

    teacher: str
    images: int
    quarantined: int
    already_there: int
    seconds: float
    images_per_second: float
    bytes_written: int
    shards_written: int
    drift: tuple[LevelDrift, ...] = ()
    """How far low precision is from float32, where features were computed in it."""


def extract(
    store_path: str | StorePath,
    images: Sequence[ImageSource],
    image_size: tuple[int, int],
    name: str,
    teacher_config: TeacherConfig,
    extract_config: ExtractConfig,
    progress: Progress,
) -> ExtractSummary:
    """Load a teacher and extract it, as `extract_teacher` does.

    Raises:
        TeacherError: the teacher cannot be built.
        ExtractionError: see `extract_teacher`.
        StoreError: likewise.
    """
    device = choose_device(extract_config.device)
    teacher = load_teacher(name, teacher_config, image_size, device)
    summary = extract_teacher(
        store_path,
        images,
        image_size,
        teacher,
        extract_config.batch_size,
        extract_config.shard_megabytes * 2**20,
        progress,
        covariance=extract_config.covariance,
        calibration_images=extract_config.calibration_images,
    )
    if teacher_config.precision == "fp32" or not summary.images:
        return summary
    rows = open_rows(store_path, images, image_size, teacher)
    drift = measure_drift(teacher, rows, extract_config.batch_size, progress)
    return replace(summary, drift=drift)


def extract_teacher(
    store_path: str | StorePath,
    images: Sequence[ImageSource],
    image_size: tuple[int, int],
    teacher: Teacher,
    batch_size: int,
    shard_bytes: int,
    progress: Progress,
    *,
    covariance: bool = False,
    calibration_images: int = 320,
) -> ExtractSummary:
    """Write a teacher's features of every image that the store lists, then mark them finished.

    The store was made by `create_store`; `images` says where its files are. Only shards that are
    not committed are computed. Batches start where shards start, so that the same batches are
    formed, and the same bits come out, whoever resumes. Where the codec has to be fitted, the
    teacher first sees `calibration_images` of the images for that. `covariance` gathers that of
    each level's channels too.

    Raises:
        ExtractionError: the store lists other images or views than the data set has.
        StoreError: no store, or this teacher is in it otherwise, or it cannot be written.
        ImageChangedError: an image is not the file that was indexed.
        NonFiniteFeaturesError: the teacher answered with NaN or infinity.
    """
    rows = open_rows(store_path, images, image_size, teacher)
    threads = os.cpu_count() or 1

    def calibrate() -> Mapping[str, FittedTarget]:
        chosen = choose_rows(rows, calibration_images)
        gathered = gather(rows, chosen, batch_size, threads, progress)
        return gathered.fit(teacher.spec.codec)

    with FeatureWriter.open(
        store_path,
        teacher.spec,
        shard_bytes,
        covariance=covariance,
        calibrate=calibrate,
    ) as writer:
        if writer.rows != len(rows.views):
            raise ExtractionError(f"images were added to {store_path} just now; run this again")
        missing = writer.missing()
        asked = [row for shard in missing for row in shard]
        good = [row for row in asked if rows.is_ok(row)]
        progress.start(f"extract {teacher.spec.name}", len(asked))
        started = time.perf_counter()
        ahead = _BATCHES_AHEAD * batch_size
        with closing(read_ahead(rows.load, good, threads, ahead)) as inputs:
            for batch in _batches(missing, batch_size):
                writer.write(batch, *answer(teacher, rows, batch, inputs))
                progress.advance(len(batch))
        writer.finish()
        seconds = time.perf_counter() - started
    return ExtractSummary(
        teacher=teacher.spec.name,
        images=len(good),
        quarantined=len(asked) - len(good),
        already_there=len(rows.views) - len(asked),
        seconds=seconds,
        images_per_second=len(good) / seconds,
        bytes_written=len(asked) * writer.row_bytes,
        shards_written=len(missing),
    )


def open_rows(
    path: str | StorePath,
    images: Sequence[ImageSource],
    image_size: tuple[int, int],
    teacher: Teacher,
) -> RowReader:
    """Return the reader of a store's rows as a teacher's inputs.

    Raises:
        ExtractionError: the store lists other images or views than the data set has.
    """
    store = FeatureStore(path)
    if store.views.image_size != image_size:
        raise ExtractionError(
            f"{path} holds views of {store.views.image_size} (height, width), asked for "
            f"{image_size}; choose another store path, or that image size"
        )
    paths = {image.id: image.path for image in images}
    if paths.keys() != set(store.images.ids):
        lacking = [name for name in store.images.ids if name not in paths]
        raise ExtractionError(
            f"{path} lists {len(store.images.ids)} images, the data set {len(paths)}; in the store "
            f"only: {', '.join(lacking[:_SHOWN]) or 'none'}. "
            + ("Index the data set into another store." if lacking else "Run `sak index --append`.")
        )
    if store.views.flips.any():
        raise ExtractionError(f"{path} asks for flipped views, which are not extracted yet")
    return RowReader(teacher=teacher, images=store.images, views=store.views, paths=paths)


def _batches(shards: Sequence[range], batch_size: int) -> Iterator[range]:
    for shard in shards:
        for start in range(shard.start, shard.stop, batch_size):
            yield range(start, min(start + batch_size, shard.stop))


def answer(
    teacher: Teacher, rows: RowReader, batch: Sequence[int], inputs: Iterator[Tensor]
) -> tuple[dict[str, _Array], _Array | None, NDArray[np.bool_]]:
    """Return levels (n, h, w, C), pooled (n, C) and validity (n,) of a batch, zeros if invalid."""
    good = [row for row in batch if rows.is_ok(row)]
    valid = np.array([rows.is_ok(row) for row in batch])
    spec = teacher.spec
    shapes = {level.name: (*level.grid, level.channels) for level in spec.levels}
    levels = {name: np.zeros((len(batch), *shape), np.float32) for name, shape in shapes.items()}
    pooled = None
    if spec.global_channels is not None:
        pooled = np.zeros((len(batch), spec.global_channels), np.float32)
    if good:
        features = teacher(torch.stack(list(islice(inputs, len(good)))))
        refuse_non_finite(features, spec.name, [rows.image_id(row) for row in good])
        for name, values in features.levels.items():
            levels[name][valid] = values.cpu().numpy()
        if pooled is not None and features.pooled is not None:
            pooled[valid] = features.pooled.cpu().numpy()
    return levels, pooled, valid


def refuse_non_finite(features: Features, teacher: str, image_ids: Sequence[str]) -> None:
    """Raise NonFiniteFeaturesError, naming images and level, where a value is no number."""
    for level, values in features.levels.items():
        finite = torch.isfinite(values).flatten(1).all(1).tolist()
        bad = [name for name, fine in zip(image_ids, finite, strict=True) if not fine]
        if bad:
            more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            raise NonFiniteFeaturesError(
                f"teacher {teacher!r}, {level}: NaN or infinity for {', '.join(bad[:_SHOWN])}"
                f"{more}. fp16 overflows where bf16 and fp32 do not; else check the weights."
            )
