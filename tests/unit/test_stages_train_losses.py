"""Losses by hand-computed cases, and what they do with nothing to learn from."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train.losses import (
    TASK_LOSSES,
    boundary_loss,
    depth_loss,
    distillation_loss,
    distillation_losses,
    normals_loss,
    parts_loss,
    saliency_loss,
    segmentation_loss,
    task_losses,
)
from stages.train.outputs import predict
from stages.train.targets import TeacherTargets


def test_distillation_takes_one_cosine_per_image() -> None:
    student = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])  # 1 x 2 x 1 grid, 2 channels
    teacher = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]]])
    cosine = 9 / (5 * 5)  # per token it would be 1 and 0
    smooth_l1 = (0 + 0 + 3.5 + 3.5) / 4
    expected = 0.9 * (1 - cosine) + 0.1 * smooth_l1
    assert distillation_loss(student, teacher).item() == pytest.approx(expected)


def test_distillation_weighs_small_differences_quadratically() -> None:
    teacher = torch.ones(2, 1, 1, 1)
    loss = distillation_loss(teacher + 0.5, teacher)
    assert loss.item() == pytest.approx(0.1 * 0.5 * 0.5**2)


@pytest.mark.parametrize(("rows", "columns"), [(6, 8), (2, 9)])
def test_grids_meet_on_the_one_with_more_rows(rows: int, columns: int) -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, rows, columns, 5)
    size = (rows, columns) if rows > 3 else (3, 4)

    def resize(x: Tensor) -> Tensor:
        first = x.permute(0, 3, 1, 2)
        return F.interpolate(first, size=size, mode="bilinear", align_corners=False)

    cosine = F.cosine_similarity(resize(student).flatten(1), resize(teacher).flatten(1))
    rest = F.smooth_l1_loss(resize(student), resize(teacher))
    expected = 0.9 * (1 - cosine.mean()) + 0.1 * rest
    torch.testing.assert_close(distillation_loss(student, teacher), expected)


def test_distillation_covers_every_teacher_and_level_from_float16() -> None:
    targets = {"a": [torch.randn(1, 2, 2, 3).half() for _ in range(2)]}
    targets["b"] = [torch.randn(1, 4, 4, 2).half()]
    students = {name: [level.float() for level in levels] for name, levels in targets.items()}
    students["b"] = [level + 1 for level in students["b"]]
    teachers = {name: TeacherTargets(levels=levels) for name, levels in targets.items()}
    losses = distillation_losses(students, teachers)
    assert {name: value.shape for name, value in losses.items()} == {"a": (2,), "b": (1,)}
    assert losses["a"].sum().item() == pytest.approx(0, abs=1e-6)
    assert losses["b"].item() > 0.01


def test_segmentation_averages_over_labelled_pixels() -> None:
    logits = torch.zeros(1, 4, 1, 3)
    logits[0, 2, 0, 0] = 5.0
    labels = torch.tensor([[[2, 1, 255]]])
    first = -math.log(math.exp(5) / (math.exp(5) + 3))
    assert segmentation_loss(logits, labels).item() == pytest.approx((first + math.log(4)) / 2)


def test_parts_leave_out_images_without_a_person() -> None:
    logits = torch.randn(3, 7, 2, 2)
    labels = torch.zeros(3, 2, 2, dtype=torch.int64)
    labels[0, 0, 0] = 4
    labels[2] = 255
    alone = F.cross_entropy(logits[:1], labels[:1])
    torch.testing.assert_close(parts_loss(logits, labels), alone)


def test_saliency_weighs_each_class_by_the_share_of_the_other() -> None:
    logits = torch.zeros(1, 2, 1, 5)
    labels = torch.tensor([[[0, 0, 0, 1, 255]]])
    expected = math.log(2) * (3 * 0.25 + 1 * 0.75) / 4
    assert saliency_loss(logits, labels).item() == pytest.approx(expected)


def test_normals_compare_unit_vectors_where_known() -> None:
    logits = torch.tensor([[0.0, 2.0], [0.0, 0.0], [5.0, 0.0]]).reshape(1, 3, 1, 2)
    labels = torch.tensor([[0.6, 0.0], [0.0, 0.0], [0.8, 0.0]]).reshape(1, 3, 1, 2)
    assert normals_loss(logits, labels).item() == pytest.approx(0.6 + 0.2)


def test_boundary_weighs_positives_nineteen_times() -> None:
    logits = torch.tensor([0.0, 0.0, 7.0]).reshape(1, 1, 1, 3)
    labels = torch.tensor([[[1.0, 0.0, 255.0]]])
    expected = math.log(2) * (0.95 + 0.05) / 2
    assert boundary_loss(logits, labels).item() == pytest.approx(expected)


def test_depth_ignores_unknown_pixels() -> None:
    logits = torch.tensor([2.0, -1.0, 9.0]).reshape(1, 1, 1, 3)
    labels = torch.tensor([[[2.5, 1.0, 0.0]]])
    assert depth_loss(logits, labels).item() == pytest.approx((0.5 + 2) / 2)


UNLABELLED = {
    "segmentation": (7, torch.full((2, 4, 4), 255)),
    "parts": (7, torch.zeros(2, 4, 4, dtype=torch.int64)),
    "saliency": (2, torch.full((2, 4, 4), 255)),
    "normals": (3, torch.zeros(2, 3, 4, 4)),
    "boundary": (1, torch.full((2, 4, 4), 255.0)),
    "depth": (1, torch.zeros(2, 4, 4)),
}


@pytest.mark.parametrize("task", TASK_LOSSES)
def test_nothing_labelled_gives_zero_and_a_gradient_path(task: str) -> None:
    channels, labels = UNLABELLED[task]
    logits = torch.randn(2, channels, 4, 4, requires_grad=True)
    loss = task_losses({task: logits}, {task: labels})[task]
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_predictions_are_in_the_units_of_the_labels() -> None:
    logits = torch.randn(2, 3, 4, 5)
    assert predict("segmentation", logits).equal(logits.argmax(1))
    assert predict("parts", logits).shape == (2, 4, 5)
    torch.testing.assert_close(predict("normals", logits).norm(dim=1), torch.ones(2, 4, 5))
    assert predict("depth", logits[:, :1]).equal(logits[:, 0])
    torch.testing.assert_close(predict("boundary", logits[:, :1]), logits[:, 0].sigmoid())
    two_way = predict("saliency", logits[:, :2])
    torch.testing.assert_close(two_way, (logits[:, 1] - logits[:, 0]).sigmoid())
    with pytest.raises(ValueError, match="colour"):
        predict("colour", logits)
