"""`sak train-student`: stage two, one run of one phase."""

from functools import partial
from pathlib import Path

import torch

from pipeline.errors import StepError
from pipeline.indexing import require_views
from pipeline.params import Params
from stages.data.dataset import Dataset, open_dataset
from stages.data.tasks import Task
from stages.extract.provenance import foreseen_provenance
from stages.extract.teachers import load_teacher
from stages.progress import Progress
from stages.stopping import stop_on_sigterm
from stages.train.checkpoint import CheckpointError
from stages.train.distributed import Ranks, joined_ranks
from stages.train.identity import TrainingRun
from stages.train.live import LiveTeacher
from stages.train.replay import replay
from stages.train.run import TrainSummary, train
from store.errors import difference
from store.files import FolderLock, remove_tree
from store.reader import FeatureStore

PHASES = ("distill", "multitask", "baseline", "single-task")


def train_student(
    params: Params,
    phase: str,
    task: str | None,
    restart: bool,
    progress: Progress,
    origin: Path | None = None,
) -> TrainSummary | None:
    """Train one run; `restart` replaces checkpoints of other settings instead of refusing them.

    A multitask run starts from the student in the folder `origin`, else from the distill run.

    Started by torchrun, each process calls this; the others than the first return None.
    """
    run, dataset, store = _opened(params, phase, task, origin)
    run.folder.mkdir(parents=True, exist_ok=True)
    with stop_on_sigterm() as stop, joined_ranks(params.runtime.device) as ranks:
        lock = FolderLock(run.folder) if ranks.first else None
        try:
            with stop.deferred():
                try:
                    summary = train(run, dataset, store, progress, ranks, stop)
                except CheckpointError:
                    if not restart:
                        raise
                    _empty(run.folder, ranks)
                    summary = train(run, dataset, store, progress, ranks, stop)
        finally:
            if lock is not None:
                lock.release()
    return summary if ranks.first else None


def replay_step(
    params: Params, phase: str, task: str | None, file: Path, origin: Path | None = None
) -> dict[str, float]:
    """Compute a step again that was refused, and return each of its terms."""
    return replay(*_opened(params, phase, task, origin), file)


def _opened(
    params: Params, phase: str, task: str | None, origin: Path | None
) -> tuple[TrainingRun, Dataset, FeatureStore]:
    dataset = open_dataset(params.data).with_tasks(params.tasks)
    run = _training_run(params, phase, task, dataset.tasks, origin)
    require_views(params)
    store = FeatureStore(params.store)
    if run.phase.targets == "cached":
        _require_asked_teachers(params, run, store)
    return run, dataset, store


def _empty(folder: Path, ranks: Ranks) -> None:
    ranks.wait()  # every process has read the checkpoints and refused them
    if ranks.first:
        for path in folder.iterdir():
            remove_tree(path) if path.is_dir() else path.unlink()
    ranks.wait()


def run_folder(params: Params, phase: str, task: str | None = None) -> Path:
    """Folder of a run: `distill`, `multitask`, `baseline`, or `single-<task>`."""
    return params.runs / (f"single-{task}" if phase == "single-task" else phase)


def _load_teachers(params: Params, device: torch.device) -> dict[str, LiveTeacher]:
    return {
        name: load_teacher(name, config, params.image_size, device)
        for name, config in params.teachers.items()
    }


def _require_asked_teachers(params: Params, run: TrainingRun, store: FeatureStore) -> None:
    """Refuse features of other settings, weights, preprocessing or code than would be used now."""
    for name in run.distilled:
        if name not in store.teachers:
            continue  # train() says what is missing
        provenance, config = store.teachers[name].provenance, params.teachers[name]
        asked = {"config": config.asked(), **foreseen_provenance(config, params.image_size)}
        stored = {key: provenance.get(key) for key in asked}
        if stored != asked:
            raise StepError(
                f"the features of '{name}' in {params.store} were written under other settings:\n"
                + "\n".join(difference(stored, asked))
                + "\n"
                f"correct the parameter file, or run `sak extract-teachers {name} --replace`"
            )


def _training_run(
    params: Params, phase: str, task: str | None, tasks: tuple[Task, ...], origin: Path | None
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
        load_teachers=partial(_load_teachers, params),
        depth=params.views.depth,
        initialise_from=(origin or run_folder(params, "distill")) if phase == "multitask" else None,
    )
