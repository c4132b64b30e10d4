"""What a training run is, and what makes two runs the same."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.data.tasks import Task
from stages.data.view import DepthRule
from stages.train.config import PhaseConfig, RuntimeConfig, StudentConfig
from stages.train.live import LoadTeachers
from stages.train.saving import WEIGHTS, StudentDescription
from store.reader import FeatureStore
from store.spec import TeacherSpec

FREE_TO_CHANGE = {
    "accumulate",
    "workers",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "cache_megabytes",
}
"""Settings that may differ between a run and its resumption. All but `accumulate` change no number;
that one, as the number of ranks, changes rounding, the noise of routers and what batch normalisation
sees at once, but neither the images of a step nor the expectation of its gradient. Device and
`compile`, which may differ too, change rounding."""


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
    load_teachers: LoadTeachers | None = None
    """What loads `teachers` where `phase.targets` is `online`."""

    @property
    def distilled(self) -> tuple[str, ...]:
        """Teachers whose stored features enter the loss."""
        return self.teachers if self.phase.alpha > 0 else ()


def describe(run: TrainingRun, specs: Mapping[str, TeacherSpec]) -> StudentDescription:
    """Return how to build the student of a run."""
    return StudentDescription(
        student=run.student,
        image_size=run.image_size,
        teachers={
            name: tuple(level.channels for level in specs[name].levels) for name in run.teachers
        },
        tasks=run.tasks,
        aligners=bool(run.distilled),
    )


def identity_of(
    run: TrainingRun,
    description: StudentDescription,
    store: FeatureStore,
    specs: Mapping[str, TeacherSpec],
    ids: tuple[str, ...],
) -> dict[str, Any]:
    """Everything that decides what a run learns; a checkpoint is only resumed under the same."""
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
        "rows_per_shard": {
            name: _rows_per_shard(store, name) for name in run.distilled if name in store.teachers
        },
    }


def _rows_per_shard(store: FeatureStore, teacher: str) -> int:
    """Return what the order of the images follows, see `stages.train.sampling.Shuffle`."""
    return store.array(teacher, store.teachers[teacher].levels[0].name).chunk[0]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
