"""Runs a student over a labelled split and measures every task.

Shapes: B batch, C channels of a task's head, H W pixels of the view.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from stages.data.dataset import Dataset
from stages.data.images import ImageError, decode_image
from stages.data.tasks import Task
from stages.data.view import view_image, whole_image_box
from stages.evaluate.metrics import build_metric
from stages.progress import Progress
from stages.train.device import Precision, autocast
from stages.train.student import Student

logger = logging.getLogger(__name__)


class EvaluationError(ValueError):
    """A student and a data set that cannot be brought together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    image: UInt8[np.ndarray, "H W 3"]
    labels: dict[str, npt.NDArray[Any]]


def evaluate(
    student: Student,
    dataset: Dataset,
    split: str,
    image_size: tuple[int, int],
    *,
    device: torch.device,
    precision: Precision,
    batch_size: int,
    progress: Progress,
) -> dict[str, float]:
    """Return the metric of each task that the student predicts and the data set labels.

    Every image of the split is seen once, whole, in view 0 of `image_size` (height, width), and
    compared with its labels in that view. Predictions are dropped batch by batch. The student is
    moved to `device` and left in eval mode. Units as in `stages.evaluate.metrics`; a task without
    one labelled pixel is NaN, with a warning. Images that cannot be read are left out, with one
    warning that counts them.

    Raises:
        EvaluationError: no task in common, another number of classes, or no readable image.
        MetricError: a prediction that is not finite, or a label outside the task's classes.
        LabelError: a label is missing or wrong.
        SourceError: the data set has no such split.
    """
    tasks = _common_tasks(student, dataset)
    dataset = dataset.with_tasks([task.name for task in tasks])
    metrics = {task.name: build_metric(task) for task in tasks}
    ids = dataset.split(split)
    student.to(device).eval()
    unreadable: list[str] = []
    progress.start(f"evaluate {split}", len(ids))
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        samples = _load(dataset, chunk, image_size, unreadable)
        if samples:
            outputs = forward(student, [sample.image for sample in samples], precision)
            for task in tasks:
                _require_channels(task, outputs[task.name])
                labels = np.stack([sample.labels[task.name] for sample in samples])
                metrics[task.name].update(
                    outputs[task.name], torch.from_numpy(labels).to(outputs[task.name].device)
                )
        progress.advance(len(chunk))
    _report_unreadable(unreadable, split, len(ids))
    return {task.name: _value(task, metrics[task.name].compute(), split) for task in tasks}


def load_view(
    dataset: Dataset, image_id: str, image_size: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """Read view 0 of an image.

    Raises:
        ImageError: the image cannot be read.
    """
    pixels = decode_image(dataset.path(image_id))
    height, width = pixels.shape[:2]
    return view_image(pixels, whole_image_box(height, width, image_size), image_size)


def normalise(student: Student, views: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Tensor:
    """Stack views into the student's input, `B 3 H W` float32 on its device."""
    device = next(student.parameters()).device
    pixels = torch.from_numpy(np.stack(views)).to(device).movedim(-1, 1).float() / 255
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (student.mean, student.std))
    return (pixels - mean) / std


def forward(
    student: Student, views: Sequence[UInt8[np.ndarray, "H W 3"]], precision: Precision = "fp32"
) -> dict[str, Float[Tensor, "B _ H W"]]:
    """Return what each head puts out for some views, in float32."""
    images = normalise(student, views)
    with torch.inference_mode(), autocast(images.device, precision):
        tasks = student(images, distillation=False).tasks
    return {name: output.float() for name, output in tasks.items()}


def _common_tasks(student: Student, dataset: Dataset) -> tuple[Task, ...]:
    common = tuple(task for task in dataset.tasks if task.name in student.task_names)
    if not common:
        labelled = [task.name for task in dataset.tasks]
        raise EvaluationError(
            f"the student predicts {list(student.task_names)} and the data set labels {labelled}: "
            "there is nothing to measure; evaluate a student of the multitask phase on labelled "
            "data"
        )
    return common


def _load(
    dataset: Dataset, ids: Sequence[str], image_size: tuple[int, int], unreadable: list[str]
) -> list[_Sample]:
    """Read images and labels; ids of images that cannot be read go to `unreadable`."""
    samples = []
    for image_id in ids:
        try:
            image = load_view(dataset, image_id, image_size)
        except ImageError as error:
            unreadable.append(f"{image_id} ({error.reason})")
            continue
        samples.append(_Sample(image=image, labels=dataset.labels(image_id, image_size)))
    return samples


def _require_channels(task: Task, output: Tensor) -> None:
    if output.shape[1] != task.channels:
        raise EvaluationError(
            f"the student predicts {output.shape[1]} channels for {task.name}, the data set has "
            f"{task.channels}; evaluate it on the data set it was trained for"
        )


def _report_unreadable(unreadable: Sequence[str], split: str, images: int) -> None:
    if len(unreadable) == images:
        raise EvaluationError(
            f"none of the {images} images of split '{split}' can be read, the first one being "
            f"{next(iter(unreadable), 'absent')}; check the data set's folder"
        )
    if unreadable:
        logger.warning(
            "%d of %d images of split '%s' cannot be read and are left out: %s",
            len(unreadable),
            images,
            split,
            ", ".join(unreadable[:5]),
        )


def _value(task: Task, value: float, split: str) -> float:
    if math.isnan(value):
        logger.warning(
            "%s has no labelled pixel in split '%s': no %s", task.name, split, task.metric
        )
    return value
