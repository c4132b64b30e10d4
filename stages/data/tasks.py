"""The dense tasks of each labelled data set: channels, loss weights and metrics.

Weights are those of the published configurations (SAK, arXiv 2410.14633). Rendered scenes, which
are ours, take PASCAL-Context's weights, and NYUD-v2's for depth.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

IGNORE = 255
"""Label value of pixels that no loss and no metric counts."""
PARTS = 7
"""Human parts, background included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One dense prediction task."""

    name: str
    channels: int
    """Channels of the prediction; for class tasks the number of classes."""
    loss_weight: float
    metric: str
    lower_is_better: bool


def _segmentation(classes: int) -> Task:
    return Task(
        name="segmentation", channels=classes, loss_weight=1.0, metric="mIoU", lower_is_better=False
    )


_PARTS = Task(name="parts", channels=PARTS, loss_weight=2.0, metric="mIoU", lower_is_better=False)
_SALIENCY = Task(name="saliency", channels=2, loss_weight=5.0, metric="maxF", lower_is_better=False)
_NORMALS = Task(name="normals", channels=3, loss_weight=10.0, metric="mErr", lower_is_better=True)
# the boundary loss stands in for odsF until the boundary benchmark is built
_BOUNDARY = Task(name="boundary", channels=1, loss_weight=50.0, metric="loss", lower_is_better=True)
_DEPTH = Task(name="depth", channels=1, loss_weight=1.0, metric="RMSE", lower_is_better=True)

NYUD_TASKS = (_segmentation(40), _DEPTH, _NORMALS, _BOUNDARY)
PASCAL_TASKS = (_segmentation(21), _PARTS, _SALIENCY, _NORMALS, _BOUNDARY)
SCENES_TASKS: tuple[Task, ...]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> tuple[Task, ...]:
        """Make `SCENES_TASKS` when first asked for: its classes come with the whole renderer."""
        if name != "SCENES_TASKS":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from stages.data.scenes import CLASSES

        return (_segmentation(len(CLASSES)), _PARTS, _SALIENCY, _NORMALS, _BOUNDARY, _DEPTH)
