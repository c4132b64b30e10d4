"""The steps that write: index, extract, train. Each joins what the stages offer, nothing more."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.params import Params
from stages.data.config import ScenesData
from stages.data.dataset import Dataset, open_dataset
from stages.data.images import index_images
from stages.data.tasks import Task
from stages.data.view import whole_image_box
from stages.extract.run import ExtractSummary, extract
from stages.progress import Progress
from stages.train.checkpoint import CheckpointError
from stages.train.run import TrainingRun, TrainSummary, train
from store.create import create_store
from store.errors import StoreMismatchError
from store.reader import FeatureStore
from store.spec import ImageTable, ViewTable

PHASES = ("distill", "multitask", "baseline", "single-task")


class StepError(ValueError):
    """A step was asked for something that the parameters do not provide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSummary:
    """What `sak index` found."""

    images: int
    quarantined: dict[str, str]
    """Reason per unusable image id."""
    splits: dict[str, int]
    tasks: tuple[str, ...]
    store: str
    images_digest: str


def index(params: Params, progress: Progress) -> IndexSummary:
    """Render the scenes if the recipe wants them, check images and labels, create the store."""
    if isinstance(params.data, ScenesData):
        _render(params.data, params.image_size, progress)
    dataset = open_dataset(params.data).with_tasks(params.tasks)
    for split in dataset.splits:
        dataset.check_labels(split)
    images = index_images(dataset.images, params.data.max_bad, progress)
    create_store(params.store, images, whole_image_views(images, params.image_size))
    return IndexSummary(
        images=len(images),
        quarantined={
            name: status
            for name, status in zip(images.ids, images.statuses, strict=True)
            if status != "ok"
        },
        splits={name: len(ids) for name, ids in dataset.splits.items()},
        tasks=tuple(task.name for task in dataset.tasks),
        store=str(params.store),
        images_digest=images.digest(),
    )


def whole_image_views(images: ImageTable, image_size: tuple[int, int]) -> ViewTable:
    """View 0 of every image; a quarantined image has no size and gets an empty box."""
    boxes = np.zeros((len(images), 4), np.float32)
    for row, (height, width) in enumerate(zip(images.heights, images.widths, strict=True)):
        if height and width:
            box = whole_image_box(height, width, image_size)
            boxes[row] = (box.top, box.left, box.height, box.width)
    rows = len(images)
    return ViewTable(
        image_size=image_size,
        boxes=boxes,
        flips=np.zeros(rows, np.bool_),
        seeds=np.zeros(rows, np.uint64),
    )


def extract_teachers(
    params: Params, names: list[str], replace: bool, progress: Progress
) -> list[ExtractSummary]:
    """Extract the named teachers, or all of them, one after the other."""
    unknown = sorted(set(names) - params.teachers.keys())
    if unknown:
        raise StepError(
            f"no teacher named {', '.join(unknown)} in the parameter file; "
            f"it has {', '.join(params.teachers)}"
        )
    dataset = open_dataset(params.data)
    return [
        _extract_one(params, name, dataset, replace, progress)
        for name in names or list(params.teachers)
    ]


def train_student(
    params: Params, phase: str, task: str | None, restart: bool, progress: Progress
) -> TrainSummary:
    """Train one run; `restart` replaces a checkpoint of other settings instead of refusing it."""
    dataset = open_dataset(params.data).with_tasks(params.tasks)
    run = _training_run(params, phase, task, dataset.tasks)
    store = FeatureStore(params.store)
    try:
        return train(run, dataset, store, progress)
    except CheckpointError:
        if not restart:
            raise
    shutil.rmtree(run.folder)
    return train(run, dataset, store, progress)


def run_folder(params: Params, phase: str, task: str | None = None) -> Path:
    """Folder of a run: `distill`, `multitask`, `baseline`, or `single-<task>`."""
    return params.runs / (f"single-{task}" if phase == "single-task" else phase)


def _render(data: ScenesData, image_size: tuple[int, int], progress: Progress) -> None:
    from stages.data.scenes import write_scenes

    write_scenes(data.root, data.train, data.val, data.seed, image_size, progress)


def _extract_one(
    params: Params, name: str, dataset: Dataset, replace: bool, progress: Progress
) -> ExtractSummary:
    arguments = (
        params.store, dataset.images, params.image_size, name, params.teachers[name],
        params.extract, progress,
    )  # fmt: skip
    try:
        return extract(*arguments)
    except StoreMismatchError as error:
        if not replace:
            advice = f"or drop them with: sak extract-teachers {name} --replace"
            raise StepError(f"{error}\n{advice}") from error
    shutil.rmtree(params.store / name)
    return extract(*arguments)


def _training_run(
    params: Params, phase: str, task: str | None, tasks: tuple[Task, ...]
) -> TrainingRun:
    if phase not in PHASES:
        raise StepError(f"no phase '{phase}'; expected one of {', '.join(PHASES)}")
    if (task is not None) != (phase == "single-task"):
        raise StepError("--task NAME belongs to single-task runs, and they need it")
    if task is not None and task not in params.tasks:
        raise StepError(f"no task '{task}' in the parameter file; it has {', '.join(params.tasks)}")
    if phase != "distill" and not params.tasks:
        raise StepError(
            "tasks is empty in the parameter file: only 'distill' trains without labels"
        )
    settings = params.distill if phase == "distill" else params.multitask
    if phase in ("baseline", "single-task"):
        settings = settings.model_copy(update={"alpha": 0.0})
    return TrainingRun(
        folder=run_folder(params, phase, task),
        image_size=params.image_size,
        student=params.student,
        teachers=() if phase == "single-task" else tuple(params.teachers),
        tasks=tuple(entry for entry in tasks if phase != "distill" and task in (None, entry.name)),
        phase=settings,
        runtime=params.runtime,
        initialise_from=run_folder(params, "distill") if phase == "multitask" else None,
    )
