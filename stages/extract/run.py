"""Extraction: one teacher's features of every image, into whatever the store still misses.

Letters: `B` batch, `C` channels, `h w` cells of a level's grid.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from stages.data.sources import ImageSource
from stages.extract.batching import find_batch_size
from stages.extract.calibrate import choose_rows, gather
from stages.extract.clock import StageClock, StageTimes
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.devices import on_gpu, streams_of
from stages.extract.drift import DRIFT_IMAGES, is_low, keep_drift
from stages.extract.equivariance import keep_equivariance
from stages.extract.errors import ExtractionError
from stages.extract.flow import Lane, flow, in_turn
from stages.extract.halving import named_out_of_memory
from stages.extract.portions import Portions
from stages.extract.reading import Recent, RowReader, Shared, open_rows
from stages.extract.sharing import write_missing
from stages.extract.teachers import Teacher, choose_device, load_teacher
from stages.progress import NoProgress, Progress
from stages.stopping import Stop
from store.calibration import FittedTarget
from store.drift import TABLE as DRIFT_TABLE
from store.drift import LevelDrift, read_drift
from store.equivariance import TABLE as EQUIVARIANCE_TABLE
from store.locks import teacher_turn
from store.remote import StorePath, locate
from store.spec import TeacherSpec
from store.writer import FeatureWriter


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
    stages: StageTimes | None = None
    """Where the time of the pass went, of all its teachers, or of the units that workers did; None
    where they did none."""
    drift: tuple[LevelDrift, ...] = ()
    """How far low precision is from float32, where features are computed in it, as the store says."""


def extract(
    store_path: str | StorePath,
    images: Sequence[ImageSource],
    image_size: tuple[int, int],
    configs: Mapping[str, TeacherConfig],
    settings: ExtractConfig,
    progress: Progress,
    stop: Stop | None = None,
) -> list[ExtractSummary]:
    """Load teachers, by name, and extract all of them in one pass over the images.

    Raises:
        TeacherError: a teacher cannot be built.
        ExtractionError: see `extract_teacher`.
        StoreError: likewise.
        Terminated: `stop` was asked for; the shards that were begun are committed.
    """
    device = choose_device(settings.device)
    teachers = {
        name: load_teacher(name, config, image_size, device) for name, config in configs.items()
    }
    extractions = [
        open_extraction(store_path, images, image_size, teacher, settings)
        for teacher in teachers.values()
    ]
    return run_together(extractions, progress, stop or Stop())


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
    return run_together([extraction], progress, stop or Stop())[0]


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
    rows = open_rows(store_path, images, image_size, Portions(teacher))
    size = settings.batch_size
    return Extraction(
        store_path=store_path,
        rows=rows,
        batch_size=_found_batch_size(teacher, rows) if size == "auto" else size,
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
            what = f"calibrating teacher {self.spec.name!r} on {len(chosen)} images"
            with named_out_of_memory(what, "choose fewer `extract: {calibration_images: ...}`"):
                gathered = gather(self.rows, chosen, self.batch_size, progress)
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
        folder = path / self.spec.name
        unknown = self.equivariance_images and not EQUIVARIANCE_TABLE.exists(folder)
        if not unknown and (DRIFT_TABLE.exists(folder) or not is_low(self.spec)):
            return
        with teacher_turn(folder):
            if self.equivariance_images:
                keep_equivariance(path, self.rows, self.equivariance_images, progress)
            keep_drift(path, self.rows, min(self.batch_size, DRIFT_IMAGES), progress)

    def lane(self, writer: FeatureWriter, clock: StageClock, shared: Shared) -> Lane:
        """Return this teacher's part in a flow."""
        rows = replace(self.rows, clock=clock, shared=shared)
        return Lane(rows=rows, batch_size=self.batch_size, writer=writer)

    def write(self, writer: FeatureWriter, shards: Iterable[range]) -> StageTimes:
        """Compute and commit shards that `writer` has claimed, in this order."""
        started = time.perf_counter()
        clock = _clock([self])
        lane = self.lane(writer, clock, _shared([self]))
        flow(lane.steps(shards), clock, NoProgress(), Stop())
        return clock.times(time.perf_counter() - started, on_gpu=on_gpu([self.rows.teacher]))


def run_together(
    extractions: Sequence[Extraction], progress: Progress, stop: Stop
) -> list[ExtractSummary]:
    """Write what is missing of these teachers, in one pass over the images, and finish them.

    Together with whoever else is at the same store.
    """
    with ExitStack() as stack:
        writers = [stack.enter_context(one.begin(progress)) for one in extractions]
        clock, shared = _clock(extractions), _shared(extractions)
        lanes = [
            one.lane(writer, clock, shared)
            for one, writer in zip(extractions, writers, strict=True)
        ]
        missing = sum(len(rows) for writer in writers for rows in writer.missing())
        names = ", ".join(one.spec.name for one in extractions)
        progress.start(f"extract {names}", missing)
        started = time.perf_counter()

        def write(shards: Sequence[Iterator[range]]) -> None:
            flow(in_turn(list(zip(lanes, shards, strict=True))), clock, progress, stop)

        done = write_missing(writers, write, progress, stop)
        for writer in writers:
            writer.finish()
        gpu = on_gpu(lane.rows.teacher for lane in lanes)
        times = clock.times(time.perf_counter() - started, on_gpu=gpu)
        return [
            _summary(*one, times) for one in zip(extractions, writers, done, strict=True)
        ]  # fmt: skip


def _summary(
    extraction: Extraction, writer: FeatureWriter, done: Sequence[range], times: StageTimes
) -> ExtractSummary:
    asked, images = sum(map(len, done)), sum(map(extraction.images_in, done))
    return ExtractSummary(
        teacher=extraction.spec.name,
        images=images,
        quarantined=asked - images,
        already_there=len(extraction.rows.views) - asked,
        seconds=times.elapsed,
        images_per_second=images / times.elapsed,
        bytes_written=asked * writer.row_bytes,
        shards_written=len(done),
        stages=times,
        drift=read_drift(locate(extraction.store_path) / extraction.spec.name, extraction.spec),
    )


def _found_batch_size(teacher: Teacher, rows: RowReader) -> int:
    good = next((row for row in range(len(rows.views)) if rows.is_ok(row)), None)
    return 1 if good is None else find_batch_size(teacher, rows.load(good))


def _clock(extractions: Sequence[Extraction]) -> StageClock:
    """Return the clock of a pass, which says how many threads it has."""
    return StageClock(
        streams=streams_of(one.rows.teacher for one in extractions),
        readers=max(one.rows.readers for one in extractions),
    )


def _shared(extractions: Sequence[Extraction]) -> Shared:
    """Return room for inputs where there are several teachers, for images where several views."""
    readers = [one.rows for one in extractions]
    return Shared(
        images=Recent() if readers[0].views.views_per_image > 1 else None,
        inputs=Recent() if len(readers) > 1 else None,
        teachers={reader.input_kind: reader.teacher for reader in readers},
    )
