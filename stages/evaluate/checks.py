"""What every metric asks of predictions and labels."""

from torch import Tensor

from stages.data.tasks import IGNORE


class MetricError(ValueError):
    """A prediction or label that no metric can be computed from."""


def require_finite(prediction: Tensor) -> None:
    """Refuse a prediction with NaN or infinity.

    Raises:
        MetricError: it has.
    """
    if not bool(prediction.isfinite().all()):
        raise MetricError(
            "the prediction holds values that are not finite: the model has diverged or the "
            "precision is too low; look at the training log, or evaluate with precision fp32"
        )


def require_classes(label: Tensor, classes: int) -> None:
    """Refuse labels that are neither one of so many classes nor ignored.

    Raises:
        MetricError: there is one.
    """
    counted = label[label != IGNORE]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= classes):
        raise MetricError(
            f"labels must lie in 0..{classes - 1} or be {IGNORE} (ignored), got "
            f"{int(counted.min())}..{int(counted.max())}; check the number of classes of the task"
        )
