"""Pictures to look at: predictions beside labels, and the router's choices.

Letters: H W pixels of the view, E experts (the stem, then the teachers).
"""

import colorsys
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from stages.data.dataset import Dataset
from stages.data.tasks import IGNORE
from stages.evaluate.run import forward, load_view, normalise
from stages.train.outputs import predict
from stages.train.student import Student
from store.files import write_file

_UNKNOWN = 0.55
"""Grey of pixels without a label."""
_CELL_WIDTH = 2.2
_DPI = 100
_STEM = "stem"

Picture = Float[np.ndarray, "H W 3"]


def save_predictions(
    student: Student, dataset: Dataset, ids: Sequence[str], path: Path
) -> tuple[str, ...]:
    """Write a PNG sheet of some labelled images: per image one row of labels, one of predictions.

    Class tasks share one palette per task, depth one scale over the sheet (given in the column's
    title, with dark near), normals are shown as (n + 1) / 2 with x, y, z in red, green, blue,
    boundary and saliency as probabilities. Grey pixels have no label. The file appears whole or
    not at all. Returns the tasks shown: those that the student predicts and the data set labels.

    Raises:
        ValueError: no image is asked for, or the student and the data set share no task.
        ImageError, LabelError, SourceError: an image or label cannot be read.
    """
    tasks = tuple(task.name for task in dataset.tasks if task.name in student.task_names)
    if not ids or not tasks:
        raise ValueError(
            f"a sheet of predictions needs images and common tasks, got {len(ids)} images and a "
            f"student for {list(student.task_names)} on data with "
            f"{[task.name for task in dataset.tasks]}"
        )
    dataset = dataset.with_tasks(tasks)
    student.eval()
    views = [load_view(dataset, image_id, student.image_size) for image_id in ids]
    labels = [dataset.labels(image_id, student.image_size) for image_id in ids]
    predictions = [_predictions(student, view) for view in views]
    metres = _depth_range(labels)
    rows: list[list[Picture | None]] = []
    for view, label, prediction in zip(views, labels, predictions, strict=True):
        rows.append([view / 255, *(paint(task, label[task], metres) for task in tasks)])
        rows.append([None, *(paint(task, prediction[task], metres) for task in tasks)])
    titles = ["image", *tasks]
    if "depth" in tasks:
        titles[titles.index("depth")] = f"depth {metres[0]:.1f} to {metres[1]:.1f} m"
    _save(_sheet(rows, titles, ids), path)
    return tasks


def router_gates(
    student: Student, dataset: Dataset, ids: Sequence[str]
) -> dict[str, Float[Tensor, "levels E"]]:
    """Return each task's gates, averaged over some images; empty without routers."""
    student.eval()
    totals: dict[str, Tensor] = {}
    for image_id in ids:
        view = load_view(dataset, image_id, student.image_size)
        for task, gates in student.gates(normalise(student, [view])).items():
            totals[task] = totals.get(task, torch.zeros_like(gates[0])) + gates[0]
    return {task: (total / len(ids)).cpu() for task, total in totals.items()}


def save_router_gates(
    gates: Mapping[str, Float[Tensor, "levels E"]], teachers: Sequence[str], path: Path
) -> None:
    """Write a PNG heat map per task: a row per level, a column per expert, share of each gate.

    Raises:
        ValueError: there are no gates (the student has no routers).
    """
    if not gates:
        raise ValueError("there are no router gates to show: the student has no routers")
    experts = [_STEM, *teachers]
    levels = len(next(iter(gates.values())))
    highest = max(0.5, *(float(shares.max()) for shares in gates.values()))
    width = max(2.4, 0.5 + 0.75 * len(experts))
    figure = Figure(
        figsize=(width * len(gates), 1.6 + 0.45 * levels), dpi=_DPI, layout="constrained"
    )
    axes = figure.subplots(1, len(gates), squeeze=False)[0]
    for ax, (task, shares) in zip(axes, gates.items(), strict=True):
        image = ax.imshow(shares.numpy(), vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        ax.set_title(task)
        ax.set_xticks(range(len(experts)), experts, rotation=35, ha="right")
        ax.set_yticks(range(levels), [str(level + 1) for level in range(levels)])
        for (row, column), share in np.ndenumerate(shares.numpy()):
            colour = "black" if share > 0.6 * highest else "white"
            ax.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, size=8)
    axes[0].set_ylabel("level")
    figure.colorbar(image, ax=list(axes), label="gate")
    _save(figure, path)


def paint(task: str, values: npt.NDArray[Any], metres: tuple[float, float]) -> Picture:
    """Colour a label or prediction `H W` (normals `H W 3`); `metres` are the ends of depth."""
    match task:
        case "segmentation" | "parts":
            return np.take(_palette(), values.clip(0, IGNORE), axis=0)
        case "normals":
            colours = (values + 1).clip(0, 2) / 2
            return np.where((values != 0).any(-1)[..., None], colours, _UNKNOWN)
        case "depth":
            near, far = metres
            colours = colormaps["viridis"]((values - near) / max(far - near, 1e-6))[..., :3]
            # only labels are exactly 0 where nothing is known
            return np.where((values != 0)[..., None], colours, _UNKNOWN)
        case _:
            grey = np.where(values == IGNORE, _UNKNOWN, values)
            return np.repeat(grey[..., None], 3, axis=-1)


def _predictions(student: Student, view: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
    outputs = forward(student, [view])
    predictions = {task: predict(task, output)[0].cpu() for task, output in outputs.items()}
    if "normals" in predictions:
        predictions["normals"] = predictions["normals"].movedim(0, -1)
    return {task: prediction.numpy() for task, prediction in predictions.items()}


def _depth_range(labels: Sequence[Mapping[str, npt.NDArray[Any]]]) -> tuple[float, float]:
    depths = [label["depth"][label["depth"] > 0] for label in labels if "depth" in label]
    known = np.concatenate([*depths, np.empty(0)])
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)


def _palette() -> Float[np.ndarray, "256 3"]:
    """Class 0 is dark; golden-angle hues in two brightnesses after it; 255 is grey."""
    colours = [
        colorsys.hsv_to_rgb(0.618034 * index % 1, 0.55 + 0.35 * (index % 3) / 2, 1 - index % 2 / 3)
        for index in range(IGNORE + 1)
    ]
    colours[0] = (0.12, 0.12, 0.16)
    colours[IGNORE] = (_UNKNOWN, _UNKNOWN, _UNKNOWN)
    return np.array(colours)


def _sheet(
    rows: Sequence[Sequence[Picture | None]], titles: Sequence[str], ids: Sequence[str]
) -> Figure:
    first = rows[0][0]
    assert first is not None
    height, width = first.shape[:2]
    cell = (_CELL_WIDTH, _CELL_WIDTH * height / width)
    figure = Figure(
        figsize=(cell[0] * len(titles), (cell[1] + 0.08) * len(rows) + 0.4),
        dpi=_DPI,
        layout="constrained",
    )
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, pictures in enumerate(rows):
        for ax, picture in zip(axes[row], pictures, strict=True):
            _show(ax, picture)
        axes[row][1].set_ylabel("prediction" if row % 2 else "label", size=9)
        if row % 2:
            axes[row][0].text(0.5, 0.95, ids[row // 2], ha="center", va="top", size=9, wrap=True)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, size=10)
    return figure


def _show(ax: Axes, picture: Picture | None) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    if picture is None:
        for spine in ax.spines.values():
            spine.set_visible(False)
    else:
        ax.imshow(np.clip(picture, 0, 1), interpolation="nearest")


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())
