"""Linear probes straight from a finished store: what each teacher's levels know of each task.

For every teacher, level and task a ridge regression maps the stored features of the training
images, standardised with the store's own statistics, to the labels on the level's grid: classes
as one-hot vectors, depth and normals as they are, boundary as 1 where any pixel of the cell lies
on one. On the validation images the predictions of every grid are brought, bilinearly, to one
raster of a quarter of the view's size and are measured there, so that coarse and fine grids,
hence teachers, can be compared. The level `all` joins a teacher's levels on their median grid.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.data.dataset import Dataset
from stages.data.tasks import Task
from stages.evaluate.metrics import TaskMetric, build_metric
from stages.evaluate.probe_inputs import CLASS_TASKS, FeatureReader, LabelReader, resize, targets
from stages.evaluate.ridge import RidgeRegression
from stages.evaluate.thresholds import AveragePrecision, MeanAveragePrecision
from stages.progress import Progress
from store.reader import FeatureStore

RASTER_STRIDE = 4
"""Predictions are measured at every fourth row and column of the view."""


class ProbeError(ValueError):
    """A store and a data set that no probe can be computed from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeScore:
    """The result of one probe; NaN where no pixel is labelled."""

    teacher: str
    level: str
    task: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeTable:
    """All probes of a store.

    Metrics are those of the evaluation, except for what is classified: there average precision
    in percent, for several classes its mean over those that occur.
    """

    scores: tuple[ProbeScore, ...]
    metrics: dict[str, str]
    lower_is_better: dict[str, bool]
    train_images: int
    val_images: int
    ridge: float

    def best(self) -> dict[str, ProbeScore]:
        """Return the best teacher, at its best level, of each task that has any labelled pixel."""
        best: dict[str, ProbeScore] = {}
        for score in self.scores:
            sign = -1 if self.lower_is_better[score.task] else 1
            leader = best.get(score.task)
            if math.isnan(score.value):
                continue
            if leader is None or sign * score.value > sign * leader.value:
                best[score.task] = score
        return best

    def as_json(self) -> dict[str, Any]:
        """Return plain values; None where a task has no labelled pixel."""
        scores: dict[str, dict[str, dict[str, float | None]]] = {}
        for score in self.scores:
            value = None if math.isnan(score.value) else score.value
            scores.setdefault(score.teacher, {}).setdefault(score.level, {})[score.task] = value
        best = {
            task: {"teacher": score.teacher, "level": score.level, "value": score.value}
            for task, score in self.best().items()
        }
        return {
            "metrics": self.metrics,
            "lower_is_better": self.lower_is_better,
            "images": {"train": self.train_images, "val": self.val_images},
            "ridge": self.ridge,
            "scores": scores,
            "best": best,
        }


def probe(
    store: FeatureStore,
    dataset: Dataset,
    *,
    ridge: float,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> ProbeTable:
    """Probe every finished teacher of a store on every task of a data set.

    Fits on split `train`, measures on `val`, on the images that are valid for all teachers. Only
    one batch of features is in memory at a time. `ridge` is the penalty relative to features of
    variance 1, for example 1e-3.

    Raises:
        ProbeError: no finished teacher, no task, or a split without a valid image.
        StoreError: an image of the data set is not in the store.
        LabelError: a label is missing or wrong.
    """
    if not store.teachers or not dataset.tasks:
        raise ProbeError(
            f"a probe needs finished teachers and labelled tasks; the store has "
            f"{sorted(store.teachers)}, the data set {[task.name for task in dataset.tasks]}; run "
            "`sak extract-teachers` on a labelled data set first"
        )
    train, val = (_valid_ids(store, dataset, split) for split in ("train", "val"))
    progress.start("probe", len(store.teachers) * (len(train) + len(val)))
    scores: list[ProbeScore] = []
    for teacher in store.teachers:
        probed = _Probe(store, dataset, teacher, batch_size, device, progress)
        probed.fit(train, ridge)
        scores += probed.measure(val)
    metrics = {task.name: task.metric for task in dataset.tasks}
    lower = {task.name: task.lower_is_better for task in dataset.tasks}
    for name in metrics.keys() & {*CLASS_TASKS, "boundary"}:
        metrics[name], lower[name] = "AP" if name == "boundary" else "mAP", False
    return ProbeTable(
        scores=tuple(scores),
        metrics=metrics,
        lower_is_better=lower,
        train_images=len(train),
        val_images=len(val),
        ridge=ridge,
    )


class _Probe:
    """All levels and tasks of one teacher."""

    def __init__(
        self,
        store: FeatureStore,
        dataset: Dataset,
        teacher: str,
        batch_size: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._dataset, self._teacher, self._batch_size = dataset, teacher, batch_size
        self._features = FeatureReader(store, teacher, device)
        self._image_size, self._device, self._progress = store.views.image_size, device, progress
        self._weights: dict[tuple[str, str], Tensor] = {}

    def fit(self, ids: Sequence[str], ridge: float) -> None:
        """Solve one regression per level and task; without a label there is none."""
        keys = [(level, task) for level in self._features.grids for task in self._dataset.tasks]
        sizes = self._features.sizes
        regressions = {
            (level, task.name): RidgeRegression(sizes[level], task.channels, self._device)
            for level, task in keys
        }
        for features, labels in self._batches(ids):
            for level, task in keys:
                label = labels.on(task.name, self._features.grids[level]).to(self._device)
                target, valid = targets(task, label)
                regressions[level, task.name].add(features[level][valid], target[valid])
        self._weights = {
            key: regression.solve(ridge)
            for key, regression in regressions.items()
            if regression.count
        }

    def measure(self, ids: Sequence[str]) -> list[ProbeScore]:
        """Measure the solved regressions."""
        height, width = self._image_size
        raster = (max(1, height // RASTER_STRIDE), max(1, width // RASTER_STRIDE))
        metrics = {
            (level, task.name): probe_metric(task)
            for level in self._features.grids
            for task in self._dataset.tasks
        }
        for features, labels in self._batches(ids):
            for (level, task), weights in self._weights.items():
                scores = resize(features[level] @ weights, raster).movedim(-1, 1)
                metrics[level, task].update(scores, labels.on(task, raster).to(self._device))
        return [
            ProbeScore(teacher=self._teacher, level=level, task=task, value=metric.compute())
            for (level, task), metric in metrics.items()
        ]

    def _batches(self, ids: Sequence[str]) -> Iterator[tuple[dict[str, Tensor], LabelReader]]:
        for start in range(0, len(ids), self._batch_size):
            chunk = ids[start : start + self._batch_size]
            yield self._features.read(chunk), LabelReader(self._dataset, chunk, self._image_size)
            self._progress.advance(len(chunk), self._teacher)


def probe_metric(task: Task) -> TaskMetric:
    """Return the accumulator that a probe of a task is judged by."""
    if task.name in CLASS_TASKS:
        return MeanAveragePrecision(task.channels)
    if task.name == "boundary":
        return AveragePrecision()
    return build_metric(task)


def _valid_ids(store: FeatureStore, dataset: Dataset, split: str) -> tuple[str, ...]:
    valid = np.logical_and.reduce([store.valid(teacher) for teacher in store.teachers])
    ids = tuple(i for i in dataset.split(split) if valid[store.row(i)])
    if not ids:
        raise ProbeError(
            f"no image of split '{split}' has features of every teacher; `sak inspect` shows which "
            "ones were quarantined and why"
        )
    return ids
