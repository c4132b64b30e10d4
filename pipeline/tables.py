"""The steps that look: evaluate, inspect, probe, teachers. Each ends in a table and its JSON."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from pipeline.params import Params, load_params
from stages.data.dataset import open_dataset
from stages.evaluate.probe import ProbeScore, ProbeTable
from stages.evaluate.probe import probe as run_probe
from stages.extract.known import TeacherDescription, describe_teachers
from stages.progress import Progress
from stages.train.device import pick_device
from store.inspect import StoreSummary, TeacherSummary, summarise
from store.reader import FeatureStore

RIDGE = 1e-3
"""Penalty of the probe, relative to features of variance 1."""
PROBE_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A table for people, the same as JSON for machines, and remarks below the table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    data: dict[str, Any]
    remarks: tuple[str, ...] = ()


def inspect(path: Path) -> Report:
    """Say what a store holds."""
    summary = summarise(path)
    rows = [_level_row(teacher, index) for teacher in summary.teachers
            for index in range(len(teacher.levels))]  # fmt: skip
    return Report(
        columns=("teacher", "level", "row shape", "bytes", "shards", "coverage", "model"),
        rows=tuple(rows),
        data=summary.to_json(),
        remarks=_store_remarks(summary),
    )


def _level_row(teacher: TeacherSummary, index: int) -> tuple[object, ...]:
    level = teacher.levels[index]
    shape = " x ".join(str(side) for side in level.shape)
    cells: tuple[object, ...] = (level.name, f"{shape} {level.dtype}", decimal(level.bytes))
    if index:
        return ("", *cells, "", "", "")
    coverage = f"{teacher.coverage:.0%}" + ("" if teacher.finished else " (unfinished)")
    model = teacher.provenance.get("source", "?")
    return (teacher.name, *cells, teacher.shards, coverage, model)


def _store_remarks(summary: StoreSummary) -> tuple[str, ...]:
    height, width = summary.image_size
    size = f"{summary.images} images as {height} x {width} views, {decimal(summary.bytes)} on disk"
    remarks = [f"{size}, format {summary.format_version}, digest {summary.digest[:16]}"]
    for teacher in summary.teachers:
        weights = str(teacher.provenance.get("weights_sha256", "?"))[:16]
        licence = teacher.provenance.get("licence") or "licence unknown"
        remarks.append(
            f"{teacher.name}: weights {weights}, {licence}, fingerprint {teacher.fingerprint[:16]}"
        )
    for image_id, reason in summary.quarantined.items():
        remarks.append(f"quarantined: {image_id}: {reason}")
    return tuple(remarks)


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


def teachers(path: Path) -> Report:
    """List the teachers of the parameter file, where there is one, and those known by name."""
    configured = load_params(path).teachers if path.is_file() else {}
    lines = describe_teachers(configured)
    return Report(
        columns=tuple(field.name for field in fields(TeacherDescription)),
        rows=tuple(tuple(asdict(line).values()) for line in lines),
        data={"teachers": [asdict(line) for line in lines]},
        remarks=(
            'in params.yaml, under teachers:   my_name: {source: "<source>", input_size: <input_size>}',
            "any other model of timm or open_clip works too: timm:<model>.<tag>, open_clip:<model>/<tag>",
        ),
    )
