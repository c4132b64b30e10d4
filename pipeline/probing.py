"""`sak probe`: what frozen features know, of a store's teachers or of a student."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import StepError
from pipeline.params import Params
from pipeline.report import Report, records
from stages.data.dataset import Dataset, open_dataset
from stages.data.sources import SPLITS
from stages.evaluate.features import FeatureSource, StoreFeatures, StudentFeatures
from stages.evaluate.probe import ProbeScore, ProbeTable
from stages.evaluate.probe import probe as run_probe
from stages.evaluate.splits import Splits, class_splits, labelled_splits, usable
from stages.progress import Progress
from stages.train.device import pick_device
from stages.train.saving import load_student
from store.reader import FeatureStore

RIDGE = 1e-3
"""Penalty of the dense probe, relative to features of variance 1."""
PROBE_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What every probe starts from."""

    store: FeatureStore
    dataset: Dataset
    student: Path | None
    device: torch.device
    progress: Progress

    @property
    def teachers(self) -> tuple[str, ...]:
        """Teachers whose stored features are read; none where a student is probed."""
        return () if self.student else tuple(self.store.teachers)

    def source(self, calibrate: tuple[str, ...]) -> FeatureSource:
        """Return the features to probe; `calibrate` are images to standardise a student's by."""
        if self.student is None:
            if not self.store.teachers:
                raise StepError(
                    f"{self.store.path} has no finished teacher to probe; run `sak "
                    "extract-teachers`, or name a student: --student FOLDER"
                )
            return StoreFeatures(self.store, self.device)
        return self.student_source(self.student, calibrate)

    def student_source(
        self, folder: Path, calibrate: tuple[str, ...], aligned: bool = False
    ) -> StudentFeatures:
        """Return a student's features, standardised by some images."""
        student = load_student(folder).to(self.device)
        size = self.store.views.image_size
        source = StudentFeatures(student, self.dataset, size, aligned)
        source.calibrate(calibrate)
        return source


def probe(params: Params, what: str, student: Path | None, progress: Progress) -> Report:
    """Run one kind of probe; see `KINDS`.

    Raises
    ------
    StepError
        When there is no such probe, or it lacks teachers, labels or a student.
    """
    if what not in KINDS:
        raise StepError(f"no probe '{what}'; expected one of {', '.join(KINDS)}")
    dataset = open_dataset(params.data)
    inputs = _Inputs(
        store=FeatureStore(params.store),
        dataset=dataset.with_tasks(params.tasks),
        student=student,
        device=pick_device(params.runtime.device),
        progress=progress,
    )
    return KINDS[what](inputs)


def _dense(inputs: _Inputs) -> Report:
    """Fit a linear probe per teacher, level and task."""
    splits = labelled_splits(inputs.store, inputs.dataset, inputs.teachers)
    table = run_probe(
        inputs.source(splits.train),
        inputs.dataset,
        splits,
        ridge=RIDGE,
        batch_size=PROBE_BATCH,
        image_size=inputs.store.views.image_size,
        device=inputs.device,
        progress=inputs.progress,
    )
    tasks = tuple(table.metrics)
    arrows = {task: "lower" if table.lower_is_better[task] else "higher" for task in tasks}
    return Report(
        columns=("teacher", "level", *(f"{task} {table.metrics[task]}" for task in tasks)),
        rows=_probe_rows(table, tasks),
        data=table.as_json(),
        remarks=tuple(
            f"best for {task} ({arrows[task]} is better): {score.teacher}, {score.level}, "
            f"{score.value:.4g}"
            for task, score in table.best().items()
        ),
    )


def _classes(inputs: _Inputs) -> Report:
    """Classify whole images, whose folders are their classes."""
    from stages.evaluate.classes import class_probe  # brings scikit-learn along

    ids = [one for split in inputs.dataset.splits for one in inputs.dataset.split(split)]
    splits = class_splits(usable(inputs.store, ids, inputs.teachers))
    source = inputs.source(splits.train)
    scores = class_probe(source, splits, batch_size=PROBE_BATCH, progress=inputs.progress)
    return records(
        scores,
        f"{len(splits.classes)} classes; learned from {len(splits.train)} images, measured on "
        f"{len(splits.val)}: percent whose class is found by 20 neighbours, by a linear map",
    )


def _fidelity(inputs: _Inputs) -> Report:
    """Compare a student's paths with their teachers' stored features."""
    from stages.evaluate.fidelity import fidelity

    if inputs.student is None:
        raise StepError("fidelity compares a student with its teachers: add --student FOLDER")
    splits = _measured(inputs, tuple(inputs.store.teachers))
    paths = inputs.student_source(inputs.student, splits.train, aligned=True)
    names = [name for name in inputs.store.teachers if name in paths.keys]
    if not names:
        raise StepError(
            f"the student in {inputs.student} has no path of a teacher that {inputs.store.path} "
            f"holds: {', '.join(inputs.store.teachers) or 'none'}"
        )
    pairs = {
        key: (name, level.name)
        for name in names
        for key, level in zip(paths.keys[name], inputs.store.teachers[name].levels, strict=True)
    }
    teachers = StoreFeatures(inputs.store, inputs.device, names)
    scores = fidelity(
        paths, teachers, pairs, splits.val, batch_size=PROBE_BATCH, progress=inputs.progress
    )
    return records(scores, f"over all tokens of {len(splits.val)} images")


def _rank(inputs: _Inputs) -> Report:
    """Count the directions that features use."""
    from stages.evaluate.fidelity import ranks

    splits = _measured(inputs, inputs.teachers)
    source = inputs.source(splits.train)
    scores = ranks(source, splits.val, batch_size=PROBE_BATCH, progress=inputs.progress)
    return records(scores, f"RankMe of all tokens of {len(splits.val)} images")


def _measured(inputs: _Inputs, teachers: tuple[str, ...]) -> Splits:
    """Return the usable images of `val`; of a data set without it, those it has."""
    train, val = (
        usable(inputs.store, inputs.dataset.splits.get(name, ()), teachers) for name in SPLITS
    )
    if not train and not val:
        raise StepError(f"no image in {inputs.store.path} is usable; `sak inspect` shows why")
    return Splits(train=train or val, val=val or train)


KINDS: dict[str, Callable[[_Inputs], Report]] = {
    "dense": _dense,
    "classes": _classes,
    "fidelity": _fidelity,
    "rank": _rank,
}
"""Linear probes of the tasks; neighbours and linear probe of folders; student against teachers;
RankMe."""


def _probe_rows(table: ProbeTable, tasks: tuple[str, ...]) -> tuple[tuple[object, ...], ...]:
    by_level: dict[tuple[str, str], dict[str, ProbeScore]] = {}
    for score in table.scores:
        by_level.setdefault((score.teacher, score.level), {})[score.task] = score
    return tuple(
        (teacher, level, *(scores[task].value if task in scores else None for task in tasks))
        for (teacher, level), scores in by_level.items()
    )
