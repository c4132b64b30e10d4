"""Metrics of a score against a binary label, over thresholds, from one histogram of the whole set.

Shapes: B batch, H W pixels, N labelled pixels. A label is 0, 1 or 255 (ignored).
"""

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from stages.data.tasks import IGNORE
from stages.evaluate.checks import require_classes, require_finite


class MaxF:
    """Largest F-measure in percent over the thresholds .05, .10 … .95, with beta^2 = 0.3.

    True, predicted and labelled positives are pooled over the set per threshold;
    F = (1 + beta^2) TP / (beta^2 labelled + predicted), which equals the usual form in precision
    and recall. Without a true positive, F is 0, also where nothing is salient at all.
    """

    BETA_SQUARED = 0.3
    THRESHOLDS = torch.arange(1, 20) / 20

    def __init__(self) -> None:
        # [label, how many thresholds the probability reaches]
        self._counts = torch.zeros(2, len(self.THRESHOLDS) + 1, dtype=torch.int64)

    def update(self, prediction: Float[Tensor, "B 2 H W"], label: Int[Tensor, "B H W"]) -> None:
        """Count one batch of two-way logits; a pixel is salient when its probability >= threshold.

        Raises:
            MetricError: the prediction is not finite, or a label is none of 0, 1, 255.
        """
        require_finite(prediction)
        require_classes(label, 2)
        valid = label != IGNORE
        probability = prediction.float().softmax(1)[:, 1][valid]
        reached = torch.bucketize(probability, self.THRESHOLDS.to(probability.device), right=True)
        self._counts += count_pairs(label[valid], reached, self._counts.shape[1])

    def compute(self) -> float:
        """Return the maximum over the thresholds."""
        if not self._counts.any():
            return math.nan
        at_least = self._counts.flip(1).cumsum(1).flip(1)[:, 1:].double()
        hits, predicted = at_least[1], at_least.sum(0)
        labelled = int(self._counts[1].sum())
        scores = (1 + self.BETA_SQUARED) * hits / (self.BETA_SQUARED * labelled + predicted)
        return 100 * float(scores.nan_to_num(0.0).max())


class AveragePrecision:
    """Area under the precision-recall curve in percent: sum over thresholds of P * (R - R before).

    Scores are compared at a resolution of 1/1000 within [-0.5, 1.5], beyond which they tie: meant
    for regressions of a label in {0, 1}. NaN when no pixel is positive.
    """

    LOWEST, BINS_PER_UNIT, BINS = -0.5, 1000, 2000

    def __init__(self) -> None:
        self._counts = torch.zeros(2, self.BINS, dtype=torch.int64)

    def update(self, prediction: Float[Tensor, "B 1 H W"], label: Float[Tensor, "B H W"]) -> None:
        """Count one batch of scores.

        Raises:
            MetricError: the prediction is not finite, or a label is none of 0, 1, 255.
        """
        require_finite(prediction)
        require_classes(label, 2)
        valid = label != IGNORE
        scaled = (prediction[:, 0][valid] - self.LOWEST) * self.BINS_PER_UNIT
        self._counts += count_pairs(label[valid], scaled.clamp(0, self.BINS - 1).long(), self.BINS)

    def compute(self) -> float:
        """Return the average precision."""
        at_least = self._counts.flip(1).cumsum(1).double()
        hits, predicted = at_least[1], at_least.sum(0)
        gained = hits.diff(prepend=hits.new_zeros(1)) / hits[-1]
        return 100 * float((hits / predicted.clamp(min=1) * gained).sum())


class MeanAveragePrecision:
    """Mean over the classes that occur of one-against-rest average precision, in percent.

    Needs no decision between classes, so that a linear regression of rare classes (parts, small
    things) is judged by its order of the pixels rather than by never winning an argmax.
    """

    def __init__(self, num_classes: int) -> None:
        self._classes = [AveragePrecision() for _ in range(num_classes)]

    def update(self, prediction: Float[Tensor, "B C H W"], label: Int[Tensor, "B H W"]) -> None:
        """Count one batch of scores per class.

        Raises:
            MetricError: the prediction is not finite.
        """
        for index, one in enumerate(self._classes):
            binary = torch.where(label == IGNORE, float(IGNORE), (label == index).float())
            one.update(prediction[:, index : index + 1], binary)

    def compute(self) -> float:
        """Return the mean; NaN when no class occurs."""
        values = [one.compute() for one in self._classes]
        values = [value for value in values if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan


def count_pairs(
    label: Shaped[Tensor, " N"], bin_index: Int[Tensor, " N"], bins: int
) -> Int[Tensor, "2 bins"]:
    """Count pixels by binary label and bin, on the CPU."""
    return torch.bincount(label.long() * bins + bin_index, minlength=2 * bins).view(2, bins).cpu()
