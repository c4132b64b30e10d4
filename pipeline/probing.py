"""`sak probe`: what each teacher, level and task allows a linear map."""

from pipeline.params import Params
from pipeline.report import Report
from stages.data.dataset import open_dataset
from stages.evaluate.probe import ProbeScore, ProbeTable
from stages.evaluate.probe import probe as run_probe
from stages.progress import Progress
from stages.train.device import pick_device
from store.reader import FeatureStore

RIDGE = 1e-3
"""Penalty of the probe, relative to features of variance 1."""
PROBE_BATCH = 16


def probe(params: Params, progress: Progress) -> Report:
    """Fit a linear probe per teacher, level and task from the store."""
    table = run_probe(
        FeatureStore(params.store),
        open_dataset(params.data).with_tasks(params.tasks),
        ridge=RIDGE,
        batch_size=PROBE_BATCH,
        device=pick_device(params.runtime.device),
        progress=progress,
    )
    tasks = tuple(table.metrics)
    arrows = {task: "lower" if table.lower_is_better[task] else "higher" for task in tasks}
    best = table.best()
    return Report(
        columns=("teacher", "level", *(f"{task} {table.metrics[task]}" for task in tasks)),
        rows=_probe_rows(table, tasks),
        data=table.as_json(),
        remarks=tuple(
            f"best for {task} ({arrows[task]} is better): {score.teacher}, {score.level}, "
            f"{score.value:.4g}"
            for task, score in best.items()
        ),
    )


def _probe_rows(table: ProbeTable, tasks: tuple[str, ...]) -> tuple[tuple[object, ...], ...]:
    by_level: dict[tuple[str, str], dict[str, ProbeScore]] = {}
    for score in table.scores:
        by_level.setdefault((score.teacher, score.level), {})[score.task] = score
    return tuple(
        (teacher, level, *(scores[task].value if task in scores else None for task in tasks))
        for (teacher, level), scores in by_level.items()
    )
