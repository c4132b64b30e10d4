"""The number each task is judged by, accumulated over a whole set with bounded memory.

Shapes: B batch, C channels of the task's head, H W pixels of the view. A prediction is what the
head puts out (logits, raw depth, unnormalised normals); a label is what `stages.data` hands out,
stacked. Everything is pooled over pixels of the whole set, as the published benchmarks do, never
averaged over images. IoU and F are in percent, depth in metres, angles in degrees.

A set without one labelled pixel has no value: `compute` then returns NaN. That is the only road to
NaN, because a prediction that is not finite is refused.
"""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix

from stages.data.tasks import IGNORE, Task
from stages.evaluate.checks import MetricError, require_classes, require_finite
from stages.evaluate.thresholds import MaxF

MAX_DEPTH = 80.0
"""Depth labels count strictly between 0 and this many metres."""
BOUNDARY_POSITIVE_WEIGHT = 0.95
"""Weight of boundary pixels in the boundary loss; the others weigh 1 minus this."""


@runtime_checkable
class TaskMetric(Protocol):
    """Accumulates one task over batches."""

    def update(self, prediction: Float[Tensor, "B C H W"], label: Tensor) -> None:
        """Count one batch."""
        ...

    def compute(self) -> float:
        """Return the value over everything counted so far, NaN when no pixel was labelled."""
        ...


class MeanIoU:
    """Mean intersection over union in percent, from one confusion matrix over the set.

    The mean runs over all classes, as in SAK's published evaluation: one that is neither labelled
    nor predicted anywhere counts as 0, like one that is only predicted. Label 255 is left out.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, prediction: Float[Tensor, "B C H W"], label: Int[Tensor, "B H W"]) -> None:
        """Count one batch of class scores; the highest wins.

        Raises:
            MetricError: the prediction is not finite, or a label is neither a class nor 255.
        """
        require_finite(prediction)
        require_classes(label, self.classes)
        counts = multiclass_confusion_matrix(
            prediction.argmax(1),
            label,
            num_classes=self.classes,
            ignore_index=IGNORE,
            validate_args=False,  # checked above, without sorting every pixel
        )
        self._confusion += counts.cpu()

    def compute(self) -> float:
        """Return the mean over all classes."""
        return 100 * float(self.per_class().mean())

    def per_class(self) -> Float[Tensor, " classes"]:
        """Return each class's IoU in 0..1, float64: 0 where absent, all NaN without a label."""
        confusion = self._confusion.double()
        if not confusion.any():
            return confusion.new_full((self.classes,), math.nan)
        hits = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - hits
        return hits / union.clamp(min=1)


class PartsMeanIoU(MeanIoU):
    """`MeanIoU` over the images that show a part; the others are left out, as in training."""

    def update(self, prediction: Float[Tensor, "B C H W"], label: Int[Tensor, "B H W"]) -> None:
        """Count those images of a batch that have a label other than 0 and 255.

        Raises:
            MetricError: the prediction is not finite, or a label is neither a class nor 255.
        """
        has_parts = ((label != IGNORE) & (label != 0)).flatten(1).any(dim=1)
        super().update(prediction, label.where(has_parts[:, None, None], IGNORE))


class DepthRMSE:
    """Root of the mean squared error in metres over all pixels with a label in (0, 80).

    Negative predictions count as 0, as in SAK's published evaluation.
    """

    def __init__(self) -> None:
        self._squares = 0.0
        self._pixels = 0

    def update(self, prediction: Float[Tensor, "B 1 H W"], label: Float[Tensor, "B H W"]) -> None:
        """Count one batch of depths in metres.

        Raises:
            MetricError: the prediction is not finite.
        """
        require_finite(prediction)
        valid = (label > 0) & (label < MAX_DEPTH)
        error = prediction[:, 0][valid].double().clamp(min=0) - label[valid].double()
        self._squares += float(error.square().sum())
        self._pixels += int(valid.sum())

    def compute(self) -> float:
        """Return sqrt(pooled mean squared error)."""
        return math.sqrt(self._squares / self._pixels) if self._pixels else math.nan


class AngularError:
    """Mean angle in degrees between predicted and labelled normals over all labelled pixels.

    Predictions are normalised first; a zero vector is 90 degrees off. A label of length 0 is
    unknown and does not count.
    """

    def __init__(self) -> None:
        self._degrees = 0.0
        self._pixels = 0

    def update(self, prediction: Float[Tensor, "B 3 H W"], label: Float[Tensor, "B H W 3"]) -> None:
        """Count one batch of normals.

        Raises:
            MetricError: the prediction is not finite.
        """
        require_finite(prediction)
        valid = label.norm(dim=-1) > 0
        predicted = F.normalize(prediction.movedim(1, -1)[valid].double(), dim=-1)
        expected = F.normalize(label[valid].double(), dim=-1)
        # Unlike acos of the dot product, exact for angles near 0 and 180 degrees.
        half = torch.atan2((predicted - expected).norm(dim=-1), (predicted + expected).norm(dim=-1))
        self._degrees += float((2 * half).rad2deg().sum())
        self._pixels += int(valid.sum())

    def compute(self) -> float:
        """Return the pooled mean."""
        return self._degrees / self._pixels if self._pixels else math.nan


class BoundaryLoss:
    """Binary cross-entropy over all labelled pixels, weighted .95 on and .05 off the boundary.

    Lower is better. It stands in until the boundary F-measure (odsF) exists, and is no part of
    delta_m.
    """

    def __init__(self) -> None:
        self._loss = 0.0
        self._pixels = 0

    def update(self, prediction: Float[Tensor, "B 1 H W"], label: Float[Tensor, "B H W"]) -> None:
        """Count one batch of boundary logits.

        Raises:
            MetricError: the prediction is not finite.
        """
        require_finite(prediction)
        valid = label != IGNORE
        target = label[valid].double()
        weight = target * BOUNDARY_POSITIVE_WEIGHT + (1 - target) * (1 - BOUNDARY_POSITIVE_WEIGHT)
        logits = prediction[:, 0][valid].double()
        loss = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
        self._loss += float(loss)
        self._pixels += int(valid.sum())

    def compute(self) -> float:
        """Return the pooled mean."""
        return self._loss / self._pixels if self._pixels else math.nan


def build_metric(task: Task) -> TaskMetric:
    """Return the empty accumulator of a task.

    Raises:
        MetricError: the task has no metric.
    """
    match task.name:
        case "segmentation":
            return MeanIoU(task.channels)
        case "parts":
            return PartsMeanIoU(task.channels)
        case "depth":
            return DepthRMSE()
        case "normals":
            return AngularError()
        case "saliency":
            return MaxF()
        case "boundary":
            return BoundaryLoss()
    raise MetricError(
        f"no metric for task '{task.name}'; expected one of segmentation, parts, saliency, "
        "normals, boundary, depth"
    )
