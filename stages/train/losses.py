"""Losses of both phases (SAK sections 3.2 and 3.4, settings as in the published code).

Shapes: `B` batch, `C` channels, `h w` a grid, `H W` image pixels. All losses are float32 scalars.
A batch without a single valid pixel gives 0 that still carries a (zero) gradient.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train.targets import TeacherTargets

IGNORE = 255
COSINE_WEIGHT = 0.9
SMOOTH_L1_WEIGHT = 0.1
BOUNDARY_POSITIVE_WEIGHT = 0.95

TaskLoss = Callable[[Tensor, Tensor], Tensor]


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare one level of the student with one of a teacher, `B h w C` each.

    0.9 (1 - cos) + 0.1 SmoothL1(beta 1), the cosine over the whole flattened tensor of an image.
    Different grids meet on the one with more rows (bilinear, corners not aligned).
    """
    student, teacher = on_one_grid(student.float(), teacher.float())
    cosine = F.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1).mean()
    return COSINE_WEIGHT * (1 - cosine) + SMOOTH_L1_WEIGHT * F.smooth_l1_loss(student, teacher)


def on_one_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two maps `B h w C` to the grid with more rows, the student's where rows are equal."""
    if student.shape[1:3] == teacher.shape[1:3]:
        return student, teacher
    if teacher.shape[1] > student.shape[1]:
        return resize_grid(student, (teacher.shape[1], teacher.shape[2])), teacher
    return student, resize_grid(teacher, (student.shape[1], student.shape[2]))


def resize_grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample `B h w C` bilinearly to another grid (rows, columns)."""
    channels_first = features.permute(0, 3, 1, 2)
    return F.interpolate(channels_first, size=grid, mode="bilinear").permute(0, 2, 3, 1)


def distillation_losses(
    paths: Mapping[str, Sequence[Tensor]], targets: Mapping[str, TeacherTargets]
) -> dict[str, Tensor]:
    """Return per teacher one loss per level (1-D); their plain sum over everything is the loss.

    `paths` are per teacher and level `B h w C` of all images of the batch; a teacher is compared
    with those that it has targets for, weighted so that the expectation is the loss over all.
    """
    return {
        name: torch.stack(
            [
                _weighted(path, level, teacher)
                for path, level in zip(paths[name], teacher.levels, strict=True)
            ]
        )
        for name, teacher in targets.items()
    }


def _weighted(path: Tensor, level: Tensor, teacher: TeacherTargets) -> Tensor:
    if not len(level):  # no image asks this teacher: nothing is learned, every gradient exists
        return path.float().sum() * 0
    student = path if teacher.rows is None else path.index_select(0, teacher.rows)
    return teacher.weight * distillation_loss(student, level)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of `B C H W` logits and `B H W` classes, averaged over labelled pixels."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def parts_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over the images that show a part; all others are left out."""
    has_parts = ((labels != IGNORE) & (labels != 0)).flatten(1).any(dim=1)
    return segmentation_loss(logits, labels.where(has_parts[:, None, None], IGNORE))


def saliency_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Two-way cross entropy, each class weighted by the other one's share of the batch."""
    valid = labels != IGNORE
    count = valid.sum().clamp(min=1)
    background = (labels == 0).sum() / count
    weight = torch.stack([1 - background, background]).to(logits.dtype)
    total = F.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORE, reduction="sum")
    return total / count


def normals_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L1 between unit vectors, summed over the three channels, averaged over known pixels.

    `labels` are `B 3 H W`, with the zero vector where the normal is unknown.
    """
    known = (labels != 0).any(dim=1)
    distance = (F.normalize(logits, dim=1) - labels).abs().sum(dim=1)
    return (distance * known).sum() / known.sum().clamp(min=1)


def boundary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy, 0.95 on boundary and 0.05 elsewhere; logits `B 1 H W`, labels `B H W`.

    The weights do not enter the average, which is over labelled pixels.
    """
    valid = labels != IGNORE
    target = labels.where(valid, 0)
    weight = torch.where(target > 0, BOUNDARY_POSITIVE_WEIGHT, 1 - BOUNDARY_POSITIVE_WEIGHT)
    total = F.binary_cross_entropy_with_logits(
        logits[:, 0], target, weight=weight * valid, reduction="sum"
    )
    return total / valid.sum().clamp(min=1)


def depth_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L1 in metres over pixels of known depth (above 0); logits `B 1 H W`, labels `B H W`."""
    known = labels > 0
    distance = (logits[:, 0] - labels).abs()
    return (distance * known).sum() / known.sum().clamp(min=1)


TASK_LOSSES: dict[str, TaskLoss] = {
    "segmentation": segmentation_loss,
    "parts": parts_loss,
    "saliency": saliency_loss,
    "normals": normals_loss,
    "boundary": boundary_loss,
    "depth": depth_loss,
}


def task_losses(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the unweighted loss of each task of `logits`."""
    return {
        name: TASK_LOSSES[name](output.float(), labels[name]) for name, output in logits.items()
    }
