"""`sak train-student`: stage two, one run of one phase."""

from pathlib import Path

from pipeline.errors import StepError
from pipeline.indexing import require_views
from pipeline.params import Params
from stages.data.dataset import open_dataset
from stages.data.tasks import Task
from stages.extract.provenance import foreseen_provenance
from stages.extract.teachers import load_teacher
from stages.progress import Progress
from stages.train.checkpoint import CheckpointError
from stages.train.device import pick_device
from stages.train.live import LiveTeacher
from stages.train.run import TrainingRun, TrainSummary, train
from store.errors import difference
from store.files import FolderLock
from store.reader import FeatureStore

PHASES = ("distill", "multitask", "baseline", "single-task")


def train_student(
    params: Params, phase: str, task: str | None, restart: bool, progress: Progress
) -> TrainSummary:
    """Train one run; `restart` replaces a checkpoint of other settings instead of refusing it."""
    dataset = open_dataset(params.data).with_tasks(params.tasks)
    run = _training_run(params, phase, task, dataset.tasks)
    require_views(params)
    store = FeatureStore(params.store)
    live = _live_teachers(params, run)
    if not live:
        _require_asked_teachers(params, run, store)
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(run.folder)
    try:
        return train(run, dataset, store, progress, live)
    except CheckpointError:
        if not restart:
            raise
        for file in run.folder.iterdir():
            file.unlink()
        return train(run, dataset, store, progress, live)
    finally:
        lock.release()


def run_folder(params: Params, phase: str, task: str | None = None) -> Path:
    """Folder of a run: `distill`, `multitask`, `baseline`, or `single-<task>`."""
    return params.runs / (f"single-{task}" if phase == "single-task" else phase)


def _live_teachers(params: Params, run: TrainingRun) -> dict[str, LiveTeacher]:
    """Load the run's teachers where they are to run live; else none is in memory."""
    if run.phase.targets == "cached":
        return {}
    device = pick_device(params.runtime.device)
    return {
        name: load_teacher(name, params.teachers[name], params.image_size, device)
        for name in run.teachers
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
                f"correct the parameter file, or run: sak extract-teachers {name} --replace"
            )


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
        depth=params.views.depth,
        initialise_from=run_folder(params, "distill") if phase == "multitask" else None,
    )
