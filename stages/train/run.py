"""One training run from its settings to a saved student, for both phases.

`distill` has no tasks and learns from stored features alone; `multitask` adds labels. A run that
was killed goes on from its checkpoint when it is started again with the same settings.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from stages.data.dataset import Dataset
from stages.data.tasks import Task
from stages.data.view import DepthRule
from stages.progress import NoProgress, Progress
from stages.train.checkpoint import load_checkpoint
from stages.train.config import PhaseConfig, RuntimeConfig, StudentConfig
from stages.train.device import peak_memory_megabytes, pick_device
from stages.train.live import LiveTeacher
from stages.train.log import TrainingLog
from stages.train.loop import Loop, Pace
from stages.train.online import OnlineTargets
from stages.train.regrid import ReusedTargets, check_reuse
from stages.train.saving import WEIGHTS, StudentDescription, initialise_from, save_student
from stages.train.stream import MEGABYTE, StreamSpec, TargetStream, usable_ids
from stages.train.student import PARTS, Student
from stages.train.targets import CachedTargets, TargetSource
from store.reader import FeatureStore
from store.spec import TeacherSpec

CHECKPOINT = "checkpoint.pt"
LOG = "log.csv"
FREE_TO_CHANGE = {"workers", "log_every", "checkpoint_every", "cache_megabytes"}
"""Settings that may differ between a run and its resumption."""


class TrainingError(ValueError):
    """The run has nothing to learn from, or not what it asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What to train and where to put it."""

    folder: Path
    """Receives the checkpoint, the log and at the end the student."""
    image_size: tuple[int, int]
    """Height and width of every view, as in the store."""
    student: StudentConfig
    teachers: tuple[str, ...]
    """Teachers with a path; their features are read only where `phase.alpha` is above 0."""
    tasks: tuple[Task, ...]
    """Tasks with a head; empty in the distillation phase."""
    phase: PhaseConfig
    runtime: RuntimeConfig
    split: str = "train"
    depth: DepthRule = "metric"
    """What depth labels of enlarged views say, see `stages.data.view.replay_label`."""
    initialise_from: Path | None = None
    """Folder of a finished run whose stem, paths, norms and aligners are taken over."""

    @property
    def distilled(self) -> tuple[str, ...]:
        """Teachers whose stored features enter the loss."""
        return self.teachers if self.phase.alpha > 0 else ()


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
    """Last row of the log without its speed columns."""
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
    live: Mapping[str, LiveTeacher] = MappingProxyType({}),
) -> TrainSummary:
    """Train a student, or go on where a killed run of the same settings stopped.

    `live` are the run's teachers where `phase.targets` is `online`; the store then says which
    images there are and what their views are, and needs no features.

    Raises:
        TrainingError: neither tasks nor teachers to learn from, a task without labels, a teacher
            or image size that the store does not have.
        NonFiniteLossError: the loss is not a number any more; the message names the images.
        CheckpointError: the folder holds the checkpoint of another run.
        StudentError: the student does not fit its teachers, image size or starting weights.
        StreamError, BatchSizeError: no usable images, or fewer than a batch.
    """
    _check(run, dataset, store)
    specs = _specs(run, store, live)
    check_reuse(run.phase.reuse, store, run.distilled)
    cached = tuple(name for name in run.distilled if name not in live)
    ids = usable_ids(dataset, run.split, store, cached)
    torch.manual_seed(run.runtime.seed)
    description = _describe(run, specs)
    student = description.build()
    random_parts = tuple(PARTS.values())
    if run.initialise_from is not None:
        random_parts = initialise_from(student, run.initialise_from)
    identity = _identity(run, description, store, specs, ids)
    stream = TargetStream(_stream_spec(run, student, ids), dataset, store, live)
    targets = _targets(run, store, stream, live)
    weights = {task.name: task.loss_weight for task in run.tasks}
    loop = Loop(student, run.phase, run.runtime, weights, targets)
    checkpoint = run.folder / CHECKPOINT
    if checkpoint.is_file():
        load_checkpoint(checkpoint, loop.state, identity)
    resumed_at = loop.state.step
    log = TrainingLog(run.folder / LOG, resumed_at)
    pace = loop.execute(
        stream,
        log,
        progress or NoProgress(),
        label=run.folder.name,
        checkpoint=checkpoint,
        identity=identity,
    )
    save_student(run.folder, student, description, {"store": store.digest(cached), **identity})
    return _summary(run, student, log, pace, resumed_at, len(ids), random_parts)


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


def _describe(run: TrainingRun, specs: Mapping[str, TeacherSpec]) -> StudentDescription:
    return StudentDescription(
        student=run.student,
        image_size=run.image_size,
        teachers={
            name: tuple(level.channels for level in specs[name].levels) for name in run.teachers
        },
        tasks=run.tasks,
        aligners=bool(run.distilled),
    )


def _identity(
    run: TrainingRun,
    description: StudentDescription,
    store: FeatureStore,
    specs: Mapping[str, TeacherSpec],
    ids: tuple[str, ...],
) -> dict[str, Any]:
    """Everything that decides the numbers of a run; a checkpoint is only resumed under the same."""
    origin = "" if run.initialise_from is None else _digest(run.initialise_from / WEIGHTS)
    return {
        "build": description.to_json(),
        "phase": run.phase.model_dump(mode="json", exclude=FREE_TO_CHANGE),
        "precision": run.runtime.precision,
        "seed": run.runtime.seed,
        "initialise_from_sha256": origin,
        "images": {
            "set": store.images.digest(),
            "views": store.views.digest(),
            "depth": run.depth,
            "trained_on": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        },
        "features": {name: specs[name].fingerprint() for name in run.distilled},
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        reuse=run.phase.reuse,
        window=run.phase.shuffle_window,
        teachers_per_image=run.phase.teachers_per_image,
    )


def _targets(
    run: TrainingRun,
    store: FeatureStore,
    stream: TargetStream,
    live: Mapping[str, LiveTeacher],
) -> TargetSource:
    if run.phase.targets == "online":
        return OnlineTargets(live, stream.levels)
    cached = CachedTargets(store, stream.levels, pick_device(run.runtime.device))
    return ReusedTargets(cached, run.phase.reuse) if run.phase.reuse.asked else cached


def _summary(
    run: TrainingRun,
    student: Student,
    log: TrainingLog,
    pace: Pace,
    resumed_at: int,
    images: int,
    random_parts: tuple[str, ...],
) -> TrainSummary:
    trained = (run.phase.steps - resumed_at) * run.phase.batch_size
    return TrainSummary(
        steps=run.phase.steps,
        resumed_at=resumed_at,
        images=images,
        seconds=pace.seconds,
        images_per_second=trained / pace.seconds if pace.seconds else 0.0,
        data_wait=pace.waited / pace.seconds if pace.seconds else 0.0,
        losses={
            name: value for name, value in log.last.items() if "loss" in name or "distill" in name
        },
        parameters=student.parameter_counts(),
        random_parts=random_parts,
        peak_memory_megabytes=peak_memory_megabytes(),
    )
