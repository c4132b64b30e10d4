"""One training run from its settings to a saved student, for both phases.

`distill` has no tasks and learns from stored features alone; `multitask` adds labels. A run that
was killed goes on from its checkpoint when it is started again with the same settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stages.data.dataset import Dataset
from stages.progress import NoProgress, Progress
from stages.stopping import Stop
from stages.train.average import finished_student
from stages.train.device import peak_memory_megabytes
from stages.train.distributed import ALONE, Ranks
from stages.train.identity import TrainingRun, describe, identity_of
from stages.train.keeping import Checkpoints, check_keep_best
from stages.train.live import LiveTeacher
from stages.train.log import TrainingLog
from stages.train.loop import Loop, Outlets, Pace
from stages.train.online import OnlineTargets
from stages.train.regrid import ReusedTargets, check_reuse
from stages.train.saving import StudentDescription, initialise_from, save_student
from stages.train.step import loss_columns
from stages.train.stream import MEGABYTE, StreamSpec, TargetStream, usable_ids
from stages.train.student import PARTS, Student
from stages.train.targets import CachedTargets, TargetSource
from stages.train.trackers import opened_trackers
from store.reader import FeatureStore
from store.spec import TeacherSpec

LOG = "log.csv"


class TrainingError(ValueError):
    """The run has nothing to learn from, or not what it asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """What a finished run has to say; times are those of this process."""

    steps: int
    """Steps of the whole run."""
    resumed_at: int
    """Step at which this process took over; 0 for a fresh run."""
    images: int
    """Usable images of the split."""
    seconds: float
    images_per_second: float
    data_wait: float
    """Share of the time spent waiting for batches, 0 to 1."""
    losses: dict[str, float]
    """Last row of the log, without speed and single levels."""
    parameters: dict[str, int]
    """Number of parameters per part of the student."""
    random_parts: tuple[str, ...]
    """Parts that did not start from another run's weights."""
    peak_memory_megabytes: float


def train(
    run: TrainingRun,
    dataset: Dataset,
    store: FeatureStore,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    stop: Stop | None = None,
) -> TrainSummary:
    """Train a student, or go on where a killed run of the same settings stopped.

    With several `ranks` each process calls this; the first one writes log, checkpoints, student.

    Raises:
        TrainingError: neither tasks nor teachers to learn from, a task without labels, a teacher
            or image size that the store does not have.
        NonFiniteLossError: loss or gradient is not a number any more; the message names the images.
        OutOfMemoryError: a step does not fit into memory.
        CheckpointError: the folder holds the checkpoints of another run.
        StudentError: the student does not fit its teachers, image size or starting weights.
        StreamError, BatchSizeError: no usable images, or fewer than a batch.
        RanksError, DeviceError: the processes cannot share a batch, or the GPUs.
        TrackerError: a tracker is not installed.
        NoSuchColumnError: `keep_best` names no loss of this run.
        Terminated: `stop` asked for the end; a checkpoint is written.
    """
    made = prepare(run, dataset, store, ranks)
    checkpoints = Checkpoints(
        folder=run.folder,
        identity=made.identity,
        keep_last=run.phase.keep_last,
        keep_best=run.phase.keep_best,
    )
    checkpoints.resume(made.loop.state)
    resumed_at = made.loop.state.step
    ranks.wait()  # nobody reads checkpoints any more when the first process begins to write
    if ranks.first:
        checkpoints.clean(made.loop.state)
    log = TrainingLog(run.folder / LOG if ranks.first else None, resumed_at)
    with opened_trackers(run.runtime.trackers if ranks.first else (), run.folder, log) as trackers:
        log.trackers = trackers
        outlets = Outlets(
            log=log,
            progress=progress if progress and ranks.first else NoProgress(),
            checkpoints=checkpoints,
            stop=stop or Stop(),
        )
        pace = made.loop.execute(made.stream, outlets)
    if ranks.first:
        student, held = finished_student(made.loop.state)
        origin = {"store": store.digest(made.cached), "weights": held, **made.identity}
        save_student(run.folder, student, made.description, origin)
    ranks.wait()
    return _summary(run, made, log, pace, resumed_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run before its first step."""

    description: StudentDescription
    parameters: dict[str, int]
    random_parts: tuple[str, ...]
    images: int
    cached: tuple[str, ...]
    """Teachers whose features are read from the store."""
    identity: dict[str, Any]
    stream: TargetStream
    loop: Loop


def prepare(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, ranks: Ranks = ALONE
) -> Prepared:
    """Check a run and build its student, stream and loop; see `train` for what is raised."""
    _check(run, dataset, store)
    device = ranks.device(run.runtime.device)
    live = _live(run, device)
    specs = _specs(run, store, live)
    levels = {name: len(specs[name].levels) for name in run.distilled}
    check_keep_best(run.phase.keep_best, loss_columns([task.name for task in run.tasks], levels))
    check_reuse(run.phase.reuse, store, run.distilled)
    cached = () if live else run.distilled
    ids = usable_ids(dataset, run.split, store, cached)
    torch.manual_seed(run.runtime.seed)
    description = describe(run, specs)
    student = description.build()
    parameters = student.parameter_counts()
    random_parts = tuple(PARTS.values())
    if run.initialise_from is not None:
        random_parts = initialise_from(student, run.initialise_from)
    stream = TargetStream(_stream_spec(run, student, ids), dataset, store, live)
    targets = _targets(run, store, stream, live, device)
    weights = {task.name: task.loss_weight for task in run.tasks}
    return Prepared(
        description=description,
        parameters=parameters,
        random_parts=random_parts,
        images=len(ids),
        cached=cached,
        identity=identity_of(run, description, store, specs, ids),
        stream=stream,
        loop=Loop(student, run.phase, run.runtime, weights, targets, ranks),
    )


def _check(run: TrainingRun, dataset: Dataset, store: FeatureStore) -> None:
    if not run.tasks and not run.distilled:
        raise TrainingError(
            "nothing to learn from: the run has no tasks, and no teachers with alpha above 0"
        )
    known = [task.name for task in dataset.tasks]
    if missing := [task.name for task in run.tasks if task.name not in known]:
        raise TrainingError(
            f"the data has no labels for {', '.join(missing)}; it has: {', '.join(known) or 'none'}"
        )
    if tuple(store.views.image_size) != tuple(run.image_size):
        raise TrainingError(
            f"the store's views are {tuple(store.views.image_size)} (height, width), the run asks "
            f"for {tuple(run.image_size)}; set that image size or extract into another store"
        )


def _live(run: TrainingRun, device: torch.device) -> Mapping[str, LiveTeacher]:
    """Load the teachers of a run that has them live; else none is in memory."""
    if run.phase.targets == "cached" or not run.teachers:
        return {}
    assert run.load_teachers is not None
    return run.load_teachers(device)


def _specs(
    run: TrainingRun, store: FeatureStore, live: Mapping[str, LiveTeacher]
) -> dict[str, TeacherSpec]:
    """Return the levels and provenance of each teacher, as stored or of the live one."""
    if run.phase.targets == "online":
        return {name: live[name].spec for name in run.teachers}
    if absent := [name for name in run.teachers if name not in store.teachers]:
        raise TrainingError(
            f"the store has no finished features of {', '.join(absent)}; it has: "
            f"{', '.join(store.teachers) or 'none'}. Run `sak extract-teachers {absent[0]}`, or "
            "set targets: online"
        )
    return {name: store.teachers[name] for name in run.teachers}


def _targets(
    run: TrainingRun,
    store: FeatureStore,
    stream: TargetStream,
    live: Mapping[str, LiveTeacher],
    device: torch.device,
) -> TargetSource:
    if run.phase.targets == "online":
        return OnlineTargets(live, stream.levels)
    cached = CachedTargets(store, stream.levels, device)
    return ReusedTargets(cached, run.phase.reuse) if run.phase.reuse.asked else cached


def _stream_spec(run: TrainingRun, student: Student, ids: tuple[str, ...]) -> StreamSpec:
    return StreamSpec(
        ids=ids,
        teachers=run.distilled,
        tasks=tuple(task.name for task in run.tasks),
        image_size=run.image_size,
        mean=student.mean,
        std=student.std,
        jitter=run.phase.jitter,
        seed=run.runtime.seed,
        cache_bytes=run.phase.cache_megabytes * MEGABYTE,
        resolution=run.phase.resolution,
        depth=run.depth,
        window=run.phase.shuffle_window,
        teachers_per_image=run.phase.teachers_per_image,
        reuse=run.phase.reuse,
    )


def _summary(
    run: TrainingRun, made: Prepared, log: TrainingLog, pace: Pace, resumed_at: int
) -> TrainSummary:
    trained = (run.phase.steps - resumed_at) * run.phase.batch_size
    return TrainSummary(
        steps=run.phase.steps,
        resumed_at=resumed_at,
        images=made.images,
        seconds=pace.seconds,
        images_per_second=trained / pace.seconds if pace.seconds else 0.0,
        data_wait=pace.waited / pace.seconds if pace.seconds else 0.0,
        losses={
            name: value
            for name, value in log.last.items()
            if ("loss" in name or "distill" in name) and "." not in name
        },
        parameters=made.parameters,
        random_parts=made.random_parts,
        peak_memory_megabytes=peak_memory_megabytes(),
    )
