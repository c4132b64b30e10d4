"""`sak evaluate`: measure every run, compare them, and leave numbers and pictures behind."""

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline import console
from pipeline.errors import StepError
from pipeline.params import Params
from pipeline.report import Report
from stages.data.dataset import Dataset, open_dataset
from stages.data.images import OK
from stages.evaluate.delta import SINGLE_TASK, Comparison, compare
from stages.evaluate.pictures import router_gates, save_predictions, save_router_gates
from stages.evaluate.run import evaluate as measure
from stages.progress import Progress
from stages.train.device import pick_device
from stages.train.files import write_atomically
from stages.train.saving import DESCRIPTION, load_student
from store.reader import FeatureStore

SPLIT = "val"
BATCH_SIZE = 16
ROWS = {"baseline": "multi-task, not distilled", "multitask": "SAK student"}
"""Run folders that become rows below the single-task row, in this order."""
PICTURES = 4


def evaluate(params: Params, progress: Progress) -> Report:
    """Measure the finished runs on the validation split; write numbers, table and pictures.

    Raises
    ------
    StepError
        When there is no validation split or no run to measure.
    """
    dataset = open_dataset(params.data).with_tasks(params.tasks)
    if SPLIT not in dataset.splits:
        raise StepError(f"the data has no split '{SPLIT}' with labels: there is nothing to measure")
    folders = _finished(params)
    if not set(folders) & set(ROWS):
        raise StepError(
            f"no finished multitask or baseline run in {params.runs}; "
            "train one first: sak train-student multitask"
        )
    _require_same_images(params, folders)
    measured = {
        name: _measure(params, folder, dataset, progress) for name, folder in folders.items()
    }
    single = {
        task: value
        for name, values in measured.items()
        if name not in ROWS
        for task, value in values.items()
    }
    results = {label: measured[name] for name, label in ROWS.items() if name in measured}
    comparison = compare(dataset.tasks, results, single)
    report = _report(comparison)
    _write(params.report, comparison, report)
    _draw(params, dataset, folders)
    return report


def _finished(params: Params) -> dict[str, Path]:
    """Folders of the finished runs by name, multi-task runs first."""
    names = [*ROWS, *(f"single-{task}" for task in params.tasks)]
    folders = {name: params.runs / name for name in names}
    return {name: folder for name, folder in folders.items() if (folder / DESCRIPTION).is_file()}


def _require_same_images(params: Params, folders: Mapping[str, Path]) -> None:
    """Refuse runs that were trained on another image set than the store's."""
    digest = FeatureStore(params.store).images.digest()
    for name, folder in folders.items():
        run = json.loads((folder / DESCRIPTION).read_text())["run"]
        trained_on = run.get("images", {}).get("set")
        if trained_on not in (None, digest):  # an imported student does not say
            raise StepError(
                f"run '{name}' in {folder} was trained on the image set {trained_on[:16]}, the "
                f"store holds {digest[:16]}; train it again, or set runs: to another folder"
            )


def _measure(
    params: Params, folder: Path, dataset: Dataset, progress: Progress
) -> dict[str, float]:
    return measure(
        load_student(folder),
        dataset,
        SPLIT,
        params.image_size,
        device=pick_device(params.runtime.device),
        precision=params.runtime.precision,
        batch_size=BATCH_SIZE,
        progress=progress,
    )


def _report(comparison: Comparison) -> Report:
    arrows = {True: "lower", False: "higher"}
    columns = tuple(
        f"{column.task} {column.metric} ({arrows[column.lower_is_better]})"
        for column in comparison.columns
    )
    rows = tuple(
        (row.run, *(row.values[column.task] for column in comparison.columns), row.delta_m)
        for row in comparison.rows
    )
    left_out = [f"{column.task}: {column.left_out}" for column in comparison.columns
                if column.left_out]  # fmt: skip
    return Report(
        columns=("model", *columns, "delta_m %"),
        rows=rows,
        data=comparison.as_json(),
        remarks=(f"delta_m against the {SINGLE_TASK} row", *left_out),
    )


def _write(folder: Path, comparison: Comparison, report: Report) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(comparison.as_json(), indent=1) + "\n"
    lines = [report.columns, ["---"] * len(report.columns), *report.rows]
    table = "".join(f"| {' | '.join(map(console.cell, line))} |\n" for line in lines)
    remarks = "".join(f"\n{remark}\n" for remark in report.remarks)
    _write_text(folder / "metrics.json", numbers)
    _write_text(folder / "metrics.md", table + remarks)


def _write_text(path: Path, text: str) -> None:
    def write(partial: Path) -> None:
        partial.write_text(text)

    write_atomically(path, write)


def _draw(params: Params, dataset: Dataset, folders: Mapping[str, Path]) -> None:
    """Pictures of the first usable validation images, and of the routers' choices there."""
    images = FeatureStore(params.store).images
    usable = {
        name for name, status in zip(images.ids, images.statuses, strict=True) if status == OK
    }
    ids = [name for name in dataset.split(SPLIT) if name in usable][:PICTURES]
    for name in ROWS.keys() & folders.keys():
        student = load_student(folders[name])
        save_predictions(student, dataset, ids, params.report / f"{name}.png")
        if gates := router_gates(student, dataset, ids):
            save_router_gates(gates, student.teachers, params.report / f"{name}-routers.png")
