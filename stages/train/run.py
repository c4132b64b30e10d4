"""One training run from its settings to a saved student, for both phases.

`distill` has no tasks and learns from stored features alone; `multitask` adds labels. A run that
was killed goes on from its checkpoint when it is started again with the same settings.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch

from stages.data.dataset import Dataset
from stages.progress import NoProgress, Progress
from stages.stopping import Stop
from stages.train.average import finished_student
from stages.train.device import peak_memory_megabytes
from stages.train.distributed import ALONE, Ranks
from stages.train.guard import NonFiniteLossError
from stages.train.identity import TrainingRun, describe, identity_of
from stages.train.keeping import Checkpoints, check_keep_best
from stages.train.learner import Learner
from stages.train.live import LiveTeacher
from stages.train.log import TrainingLog
from stages.train.loop import Loop, Pupil
from stages.train.online import OnlineTargets
from stages.train.record import Record
from stages.train.regrid import ReusedTargets, check_reuse
from stages.train.saving import StudentDescription, initialise_from, save_student
from stages.train.step import loss_columns
from stages.train.stream import MEGABYTE, StreamSpec, TargetStream, usable_ids
from stages.train.student import PARTS, Student
from stages.train.targets import CachedTargets, TargetSource
from stages.train.together import all_teachers, check_same, check_settings
from stages.train.trackers import opened_trackers
from stages.train.trainable import choose_trainable
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
    return train_together((run,), dataset, store, progress, ranks, stop)[0]


def train_together(
    runs: Sequence[TrainingRun],
    dataset: Dataset,
    store: FeatureStore,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    stop: Stop | None = None,
) -> list[TrainSummary]:
    """Train several students from one stream; each ends with the bytes that it has trained alone.

    What is read comes from the store once for all. A student whose loss is not finite ends early,
    the others are finished and saved before that is raised. See `train` for what else is.

    Raises:
        TogetherError: the runs would not read the same.
        NonFiniteLossError: it names the students that ended early, and why.
    """
    check_settings(runs)
    made = [prepare(run, dataset, store, ranks) for run in runs]
    check_same({run.folder.name: one.order for run, one in zip(runs, made, strict=True)})
    resumed = [_resumed(one) for one in made]
    ranks.wait()  # nobody reads checkpoints any more when the first process begins to write
    with ExitStack() as stack:
        pupils = [_pupil(one, at, ranks, stack) for one, at in zip(made, resumed, strict=True)]
        Loop(
            pupils=pupils,
            stream=_shared_stream(made, dataset, store),
            ranks=ranks,
            progress=progress if progress and ranks.first else NoProgress(),
            stop=stop or Stop(),
        ).execute()
    for one, pupil in zip(made, pupils, strict=True):
        if ranks.first and pupil.error is None:
            _save(one, store)
    ranks.wait()
    _raise_ended(pupils)
    return [_summary(*each) for each in zip(made, pupils, resumed, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run before its first step."""

    run: TrainingRun
    description: StudentDescription
    parameters: dict[str, int]
    random_parts: tuple[str, ...]
    images: int
    cached: tuple[str, ...]
    """Teachers whose features are read from the store."""
    identity: dict[str, Any]
    stream: TargetStream
    learner: Learner

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this run."""
        return Checkpoints(
            folder=self.run.folder,
            identity=self.identity,
            keep_last=self.run.phase.keep_last,
            keep_best=self.run.phase.keep_best,
        )

    @property
    def order(self) -> dict[str, Any]:
        """What the order of the images, and what is done to them, follows besides the settings."""
        shards = self.stream.shuffle().shards
        return {
            "usable images": sha256("\n".join(self.stream.spec.ids).encode()).hexdigest()[:16],
            "shards of its teachers (digest)": sha256(shards.tobytes()).hexdigest()[:16],
            "mean of the student's images": self.stream.spec.mean,
            "deviation of the student's images": self.stream.spec.std,
        }


def prepare(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, ranks: Ranks = ALONE
) -> Prepared:
    """Check a run and build its student, stream and learner; see `train` for what is raised."""
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
    choose_trainable(student, run.phase)
    stream = TargetStream(_stream_spec(run, student, ids), dataset, store, live)
    targets = _targets(run, store, stream, live, device)
    weights = {task.name: task.loss_weight for task in run.tasks}
    return Prepared(
        run=run,
        description=description,
        parameters=parameters,
        random_parts=random_parts,
        images=len(ids),
        cached=cached,
        identity=identity_of(run, description, store, specs, ids),
        stream=stream,
        learner=Learner(
            student, run.phase, run.runtime, weights, targets, ranks, teachers=run.distilled
        ),
    )


def _shared_stream(made: Sequence[Prepared], dataset: Dataset, store: FeatureStore) -> TargetStream:
    """Return the stream of one run, or one with the teachers of all."""
    if len(made) == 1:
        return made[0].stream
    teachers = all_teachers([one.run for one in made])
    return TargetStream(replace(made[0].stream.spec, teachers=teachers), dataset, store)


def _resumed(made: Prepared) -> int:
    """Bring a run to its newest checkpoint; return its step."""
    made.checkpoints.resume(made.learner.state)
    return made.learner.state.step


def _pupil(made: Prepared, resumed_at: int, ranks: Ranks, stack: ExitStack) -> Pupil:
    run, checkpoints = made.run, made.checkpoints
    if ranks.first:
        checkpoints.clean(made.learner.state)
    names = run.runtime.trackers if ranks.first else ()
    log = TrainingLog(run.folder / LOG if ranks.first else None, resumed_at)
    log.trackers = stack.enter_context(opened_trackers(names, run.folder, log))
    return Pupil(
        learner=made.learner, record=Record(run.phase, log, checkpoints, writer=ranks.first)
    )


def _save(made: Prepared, store: FeatureStore) -> None:
    student, held = finished_student(made.learner.state)
    origin = {"store": store.digest(made.cached), "weights": held, **made.identity}
    save_student(made.run.folder, student, made.description, origin)


def _raise_ended(pupils: Sequence[Pupil]) -> None:
    ended = {pupil.record.folder.name: pupil.error for pupil in pupils if pupil.error}
    if len(pupils) == 1 and ended:
        raise next(iter(ended.values()))
    if ended:
        told = "\n".join(f"{name}: {error}" for name, error in ended.items())
        raise NonFiniteLossError(
            f"{len(ended)} of {len(pupils)} students ended early, the others are finished and saved "
            f"(to compute a step again, train that variant alone with --replay):\n{told}"
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


def _summary(made: Prepared, pupil: Pupil, resumed_at: int) -> TrainSummary:
    run, pace = made.run, pupil.record.pace
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
            for name, value in pupil.record.log.last.items()
            if ("loss" in name or "distill" in name) and "." not in name
        },
        parameters=made.parameters,
        random_parts=made.random_parts,
        peak_memory_megabytes=peak_memory_megabytes(),
    )
