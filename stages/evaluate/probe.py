"""Linear probes of dense tasks: what each level of a teacher, or of a student, knows of each task.

For every teacher, level and task a ridge regression maps the standardised features of the training
images, straight from a finished store or from a student, to the labels on the level's grid: classes
as one-hot vectors, depth and normals as they are, boundary as 1 where any pixel of the cell lies
on one. On the validation images the predictions of every grid are brought, bilinearly, to one
raster of a quarter of the view's size and are measured there, so that coarse and fine grids,
hence teachers, can be compared. The level `all` joins a teacher's levels on their median grid.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.data.dataset import Dataset
from stages.data.tasks import Task
from stages.evaluate.features import FeatureSource, Key
from stages.evaluate.metrics import TaskMetric, build_metric
from stages.evaluate.probe_inputs import CLASS_TASKS, LabelReader, ProbeFeatures, resize, targets
from stages.evaluate.ridge import RidgeRegression
from stages.evaluate.splits import Splits
from stages.evaluate.thresholds import AveragePrecision, MeanAveragePrecision
from stages.progress import Progress
from store.spec import Grid

RASTER_STRIDE = 4
"""Predictions are measured at every fourth row and column of the view."""


class ProbeError(ValueError):
    """Features and a data set that no probe can be computed from."""


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
    source: FeatureSource,
    dataset: Dataset,
    splits: Splits,
    *,
    ridge: float,
    batch_size: int,
    image_size: Grid,
    device: torch.device,
    progress: Progress,
) -> ProbeTable:
    """Probe every level of a source on every task of a data set.

    Fits on the training images, measures on the others. Only one batch of features is in memory
    at a time. `ridge` is the penalty relative to features of variance 1, for example 1e-3.

    Raises:
        ProbeError: nothing to probe, or no task.
        StoreError: an image of the data set is not in the store.
        LabelError: a label is missing or wrong.
    """
    if not source.grids or not dataset.tasks:
        raise ProbeError(
            f"a probe needs finished teachers and labelled tasks; got "
            f"{sorted({name for name, _ in source.grids})} and "
            f"{[task.name for task in dataset.tasks]}; run `sak extract-teachers` on a labelled "
            "data set first"
        )
    progress.start("probe", len(splits.train) + len(splits.val))
    probed = _Probe(ProbeFeatures(source), dataset, image_size, batch_size, device, progress)
    probed.fit(splits.train, ridge)
    scores = probed.measure(splits.val)
    metrics = {task.name: task.metric for task in dataset.tasks}
    lower = {task.name: task.lower_is_better for task in dataset.tasks}
    for name in metrics.keys() & {*CLASS_TASKS, "boundary"}:
        metrics[name], lower[name] = "AP" if name == "boundary" else "mAP", False
    return ProbeTable(
        scores=tuple(scores),
        metrics=metrics,
        lower_is_better=lower,
        train_images=len(splits.train),
        val_images=len(splits.val),
        ridge=ridge,
    )


class _Probe:
    """All levels and tasks of a source."""

    def __init__(
        self,
        features: ProbeFeatures,
        dataset: Dataset,
        image_size: Grid,
        batch_size: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._features, self._dataset, self._batch_size = features, dataset, batch_size
        self._image_size, self._device, self._progress = image_size, device, progress
        self._weights: dict[tuple[Key, str], Tensor] = {}

    def fit(self, ids: Sequence[str], ridge: float) -> None:
        """Solve one regression per level and task; without a label there is none."""
        keys = [(key, task) for key in self._features.grids for task in self._dataset.tasks]
        sizes = self._features.sizes
        regressions = {
            (key, task.name): RidgeRegression(sizes[key], task.channels, self._device)
            for key, task in keys
        }
        for features, labels in self._batches(ids):
            for key, task in keys:
                label = labels.on(task.name, self._features.grids[key]).to(self._device)
                target, valid = targets(task, label)
                regressions[key, task.name].add(features[key][valid], target[valid])
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
            (key, task.name): probe_metric(task)
            for key in self._features.grids
            for task in self._dataset.tasks
        }
        for features, labels in self._batches(ids):
            for (key, task), weights in self._weights.items():
                scores = resize(features[key] @ weights, raster).movedim(-1, 1)
                metrics[key, task].update(scores, labels.on(task, raster).to(self._device))
        return [
            ProbeScore(teacher=key[0], level=key[1], task=task, value=metric.compute())
            for (key, task), metric in metrics.items()
        ]

    def _batches(self, ids: Sequence[str]) -> Iterator[tuple[dict[Key, Tensor], LabelReader]]:
        for start in range(0, len(ids), self._batch_size):
            chunk = ids[start : start + self._batch_size]
            yield self._features.read(chunk), LabelReader(self._dataset, chunk, self._image_size)
            self._progress.advance(len(chunk))


def probe_metric(task: Task) -> TaskMetric:
    """Return the accumulator that a probe of a task is judged by."""
    if task.name in CLASS_TASKS:
        return MeanAveragePrecision(task.channels)
    if task.name == "boundary":
        return AveragePrecision()
    return build_metric(task)
