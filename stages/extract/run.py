"""Extraction: one teacher's features of every image, into whatever the store still misses.

Letters: `B` batch, `C` channels, `h w` cells of a level's grid.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, takewhile, tee

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.data.sources import ImageSource
from stages.extract.calibrate import choose_rows, gather
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.encode import Encoder, refuse_unstorable
from stages.extract.equivariance import keep_equivariance
from stages.extract.errors import ExtractionError
from stages.extract.portions import Portions
from stages.extract.reading import RowReader, read_ahead
from stages.extract.sharing import write_missing
from stages.extract.teachers import Features, Teacher, choose_device, load_teacher
from stages.progress import Progress
from stages.stopping import Stop
from store.calibration import FittedTarget
from store.locks import teacher_turn
from store.reader import FeatureStore
from store.remote import StorePath, locate
from store.spec import TeacherSpec
from store.writer import FeatureWriter

_BATCHES_AHEAD = 2
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractSummary:
    """What a run did; images, bytes and seconds are this run's, without what was there before.

    `images` went through the teacher in `seconds`, loading it not counted; `quarantined` rows have
    no features; `already_there` are rows of shards that others committed, before or meanwhile; `bytes_written` are features
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


def extract(
    store_path: str | StorePath,
    images: Sequence[ImageSource],
    image_size: tuple[int, int],
    name: str,
    teacher_config: TeacherConfig,
    extract_config: ExtractConfig,
    progress: Progress,
    stop: Stop | None = None,
) -> ExtractSummary:
    """Load a teacher and extract it, as `extract_teacher` does.

    Raises:
        TeacherError: the teacher cannot be built.
        ExtractionError: see `extract_teacher`.
        StoreError: likewise.
        Terminated: `stop` was asked for; the shard that was begun is committed.
    """
    device = choose_device(extract_config.device)
    teacher = load_teacher(name, teacher_config, image_size, device)
    extraction = open_extraction(store_path, images, image_size, teacher, extract_config)
    return extraction.run(progress, stop or Stop())


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
    equivariance_images: int = 0,
    stop: Stop | None = None,
) -> ExtractSummary:
    """Write a teacher's features of every image that the store lists, then mark them finished.

    The store was made by `create_store`; `images` says where its files are. Only shards that are
    not committed are computed, and those that no other process is at. Batches start where shards
    start, so that the same batches are formed, and the same bits come out, whoever resumes. Where
    the codec has to be fitted, the teacher first sees `calibration_images` of the images for that.
    `covariance` gathers that of each level's channels too. Before the first row is written,
    `equivariance_images` of the images show how far the levels follow flips, crops and scale.

    Raises:
        ExtractionError: the store lists other images or views than the data set has.
        StoreError: no store, or this teacher is in it otherwise, or it cannot be written.
        ImageChangedError: an image is not the file that was indexed.
        NonFiniteFeaturesError: the teacher answered with NaN or infinity.
        BatchTooLargeError: not even one image fits into memory.
        Terminated: `stop` was asked for; the shard that was begun is committed.
    """
    extraction = Extraction(
        store_path=store_path,
        rows=open_rows(store_path, images, image_size, Portions(teacher)),
        batch_size=batch_size,
        shard_bytes=shard_bytes,
        covariance=covariance,
        calibration_images=calibration_images,
        equivariance_images=equivariance_images,
    )
    return extraction.run(progress, stop or Stop())


def open_extraction(
    store_path: str | StorePath,
    images: Sequence[ImageSource],
    image_size: tuple[int, int],
    teacher: Teacher,
    settings: ExtractConfig,
) -> "Extraction":
    """Return the extraction of a teacher as the parameter file asks for it.

    Raises:
        ExtractionError: the store lists other images or views than the data set has.
    """
    return Extraction(
        store_path=store_path,
        rows=open_rows(store_path, images, image_size, Portions(teacher)),
        batch_size=settings.batch_size,
        shard_bytes=settings.shard_megabytes * 2**20,
        covariance=settings.covariance,
        calibration_images=settings.calibration_images,
        equivariance_images=settings.equivariance_images,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """A teacher with the rows it has to see, for one process to run or for several to share."""

    store_path: str | StorePath
    rows: RowReader
    batch_size: int
    shard_bytes: int
    covariance: bool
    calibration_images: int
    equivariance_images: int

    @property
    def spec(self) -> TeacherSpec:
        """What the teacher gives."""
        return self.rows.teacher.spec

    def images_in(self, rows: Iterable[int]) -> int:
        """Return how many of these rows are of readable images."""
        return sum(self.rows.is_ok(row) for row in rows)

    def begin(self, progress: Progress) -> FeatureWriter:
        """Begin or resume the teacher in the store, its codecs fitted where needed."""

        def calibrate() -> Mapping[str, FittedTarget]:
            chosen = choose_rows(self.rows, self.calibration_images)
            gathered = gather(self.rows, chosen, self.batch_size, _threads(), progress)
            return gathered.fit(self.spec.codec)

        writer = FeatureWriter.open(
            self.store_path,
            self.spec,
            self.shard_bytes,
            covariance=self.covariance,
            calibrate=calibrate,
        )
        try:
            self._prepare(writer, progress)
        except BaseException:
            writer.close()
            raise
        return writer

    def _prepare(self, writer: FeatureWriter, progress: Progress) -> None:
        path = locate(self.store_path)
        if writer.images_digest != self.rows.images.digest():
            raise ExtractionError(f"the images of {path} changed just now; run this again")
        if self.equivariance_images and writer.missing():
            with teacher_turn(path / self.spec.name):
                keep_equivariance(path, self.rows, self.equivariance_images, progress)

    def write(
        self, writer: FeatureWriter, shards: Iterator[range], progress: Progress, stop: Stop
    ) -> None:
        """Compute and commit shards, in this order; once asked to stop, begin no further one.

        `shards` are drawn while the one before is still computed, so that images are read ahead.
        """
        shards, coming = tee(shards)
        good = (row for shard in coming for row in shard if self.rows.is_ok(row))
        ahead = _BATCHES_AHEAD * self.batch_size
        encoder = Encoder(self.spec, writer.arrays, writer.codecs)
        with closing(read_ahead(self.rows.load, good, _threads(), ahead)) as inputs:
            for shard in takewhile(lambda _: not stop.requested, shards):
                for batch in _batches(shard, self.batch_size):
                    features, valid = answer(self.rows.teacher, self.rows, batch, inputs)
                    writer.write_codes(batch, encoder(features, valid), valid)
                    progress.advance(len(batch))

    def run(self, progress: Progress, stop: Stop) -> ExtractSummary:
        """Write what is missing, together with whoever else is at it, and finish the teacher."""
        with self.begin(progress) as writer:
            missing = writer.missing()
            progress.start(f"extract {self.spec.name}", sum(map(len, missing)))
            started = time.perf_counter()
            done = write_missing(
                writer, lambda shards: self.write(writer, shards, progress, stop), progress, stop
            )
            writer.finish()
            seconds = time.perf_counter() - started
        asked, images = sum(map(len, done)), sum(map(self.images_in, done))
        return ExtractSummary(
            teacher=self.spec.name,
            images=images,
            quarantined=asked - images,
            already_there=len(self.rows.views) - asked,
            seconds=seconds,
            images_per_second=images / seconds,
            bytes_written=asked * writer.row_bytes,
            shards_written=len(done),
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
    return RowReader(teacher=teacher, images=store.images, views=store.views, paths=paths)


def _threads() -> int:
    return os.cpu_count() or 1


def _batches(shard: range, batch_size: int) -> Iterator[range]:
    for start in range(shard.start, shard.stop, batch_size):
        yield range(start, min(start + batch_size, shard.stop))


def answer(
    teacher: Teacher, rows: RowReader, batch: Sequence[int], inputs: Iterator[Tensor]
) -> tuple[Features | None, NDArray[np.bool_]]:
    """Return what a teacher says of the valid rows of a batch, None if there are none, and which.

    Raises:
        NonFiniteFeaturesError: the teacher answered with what cannot be stored.
    """
    good = [row for row in batch if rows.is_ok(row)]
    valid = np.array([rows.is_ok(row) for row in batch])
    if not good:
        return None, valid
    features = teacher(torch.stack(list(islice(inputs, len(good)))))
    refuse_unstorable(features, teacher.spec, [rows.image_id(row) for row in good])
    return features, valid
