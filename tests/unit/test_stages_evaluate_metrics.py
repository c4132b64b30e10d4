"""Each metric against values worked out by hand, and at its edges."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional.classification import binary_average_precision

from stages.data.tasks import NYUD_TASKS, PASCAL_TASKS, Task
from stages.evaluate.checks import MetricError
from stages.evaluate.metrics import (
    AngularError,
    BoundaryLoss,
    DepthRMSE,
    MeanIoU,
    PartsMeanIoU,
    TaskMetric,
    build_metric,
)
from stages.evaluate.thresholds import AveragePrecision, MaxF, MeanAveragePrecision

SIX_TASKS = tuple({task.name: task for task in (*PASCAL_TASKS, *NYUD_TASKS)}.values())


def scores(classes: list[int], channels: int) -> Tensor:
    """Class scores `1 C 1 W` whose highest is at the given class."""
    return F.one_hot(torch.tensor(classes), channels).T[None, :, None].float()


def row(values: list[int]) -> Tensor:
    return torch.tensor(values)[None, None]


def salient(probabilities: list[float]) -> Tensor:
    """Two-way logits `1 2 1 W` with the given probability of class 1."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([torch.zeros_like(p), torch.logit(p)])[None, :, None].float()


class TestMeanIoU:
    def test_pools_pixels_and_counts_absent_classes_as_zero(self) -> None:
        metric = MeanIoU(4)
        metric.update(scores([0, 0, 1], 4), row([0, 1, 1]))
        metric.update(scores([0, 1, 2], 4), row([0, 0, 255]))
        # class 0: 2 hits, union 2 + 1 + 1; class 1: 1 hit, union 1 + 1 + 1; 2 and 3 absent
        assert metric.compute() == pytest.approx(100 * (2 / 4 + 1 / 3 + 0 + 0) / 4)
        assert metric.per_class().tolist() == pytest.approx([2 / 4, 1 / 3, 0, 0])

    def test_class_that_is_only_predicted_counts_as_zero(self) -> None:
        metric = MeanIoU(3)
        metric.update(scores([0, 0, 2], 3), row([0, 0, 0]))
        assert metric.compute() == pytest.approx(100 * (2 / 3 + 0 + 0) / 3)

    def test_equals_torchmetrics_sum_over_classes(self) -> None:
        generator = torch.Generator().manual_seed(0)
        prediction = torch.randn(3, 9, 8, 10, generator=generator)
        label = torch.randint(0, 7, (3, 8, 10), generator=generator)  # classes 7 and 8 unlabelled
        label[0, :4] = 255
        prediction[:, 8] = -99  # and 8 never predicted
        metric = MeanIoU(9)
        for one in range(3):
            metric.update(prediction[one : one + 1], label[one : one + 1])
        reference = MulticlassJaccardIndex(9, average="none", ignore_index=255)
        reference.update(prediction, label)
        expected = reference.compute()
        assert metric.compute() == pytest.approx(100 * float(expected.sum()) / 9, rel=1e-6)

    def test_background_only_images_count(self) -> None:
        metric = MeanIoU(2)
        metric.update(scores([1, 1], 2), row([1, 1]))
        metric.update(scores([1, 0], 2), row([0, 0]))
        assert metric.compute() == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)

    def test_parts_leave_out_images_without_a_part(self) -> None:
        metric = PartsMeanIoU(2)
        prediction = torch.cat([scores([1, 0, 1], 2)] * 3)
        metric.update(prediction, torch.tensor([[[1, 0, 0]], [[0, 0, 255]], [[255, 255, 255]]]))
        assert metric.compute() == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)

    def test_parts_of_a_set_without_any_are_nan(self) -> None:
        metric = PartsMeanIoU(2)
        metric.update(scores([1, 0], 2), row([0, 0]))
        assert math.isnan(metric.compute())

    @pytest.mark.parametrize("value", [4, -1, 254])
    def test_refuses_unknown_label(self, value: int) -> None:
        with pytest.raises(MetricError, match=r"0\.\.3 or be 255"):
            MeanIoU(4).update(scores([0, 1], 4), row([0, value]))


class TestDepthRMSE:
    def test_pools_squared_errors_of_known_pixels(self) -> None:
        metric = DepthRMSE()
        metric.update(torch.tensor([[[[1.0, 5.0, 9.0]]]]), torch.tensor([[[2.0, 0.0, 80.0]]]))
        metric.update(torch.tensor([[[[3.0, 4.0, 7.0]]]]), torch.tensor([[[3.0, 6.0, -1.0]]]))
        assert metric.compute() == pytest.approx(math.sqrt((1 + 0 + 4) / 3))

    def test_negative_prediction_counts_as_zero(self) -> None:
        metric = DepthRMSE()
        metric.update(torch.tensor([[[[-1.0]]]]), torch.tensor([[[2.0]]]))
        assert metric.compute() == pytest.approx(2.0)

    def test_nan_label_does_not_count(self) -> None:
        metric = DepthRMSE()
        metric.update(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[math.nan, 4.0]]]))
        assert metric.compute() == pytest.approx(2.0)

    def test_many_small_batches_lose_no_precision(self) -> None:
        metric = DepthRMSE()
        for _ in range(200):
            metric.update(torch.full((1, 1, 8, 8), 1.1), torch.full((1, 8, 8), 1.0))
        expected = float(torch.tensor(1.1).double() - 1.0)
        assert metric.compute() == pytest.approx(expected, rel=1e-12)


class TestAngularError:
    @pytest.mark.parametrize(
        ("prediction", "degrees"),
        [
            ((0.0, 0.0, 1.0), 0.0),
            ((0.0, 3.0, 3.0), 45.0),
            ((2.0, 0.0, 0.0), 90.0),
            ((0.0, 0.0, -0.5), 180.0),
            ((0.0, 0.0, 0.0), 90.0),
            ((0.0, 1e-3, 1.0), math.degrees(math.atan(1e-3))),
        ],
    )
    def test_angle(self, prediction: tuple[float, float, float], degrees: float) -> None:
        metric = AngularError()
        metric.update(
            torch.tensor(prediction).view(1, 3, 1, 1), torch.tensor([[[[0.0, 0.0, 1.0]]]])
        )
        assert metric.compute() == pytest.approx(degrees, abs=1e-4)

    def test_pools_known_pixels_of_all_images(self) -> None:
        metric = AngularError()
        up, right, unknown = [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        prediction = torch.tensor([up, up, up]).T.view(1, 3, 1, 3)
        metric.update(prediction, torch.tensor([[[up, up, up]]]))
        metric.update(prediction, torch.tensor([[[right, unknown, unknown]]]))
        assert metric.compute() == pytest.approx(90 / 4)  # not (0 + 90) / 2


class TestMaxF:
    def test_pools_counts_before_the_maximum(self) -> None:
        metric = MaxF()
        metric.update(salient([0.99, 0.42, 0.02]), row([1, 0, 0]))
        metric.update(salient([0.62, 0.42, 0.99]), row([1, 1, 255]))
        # up to .40: TP 3 of 4 predicted, 3 labelled; .45 to .60: TP 2 of 2; then TP 1 of 1
        candidates = [1.3 * 3 / (0.3 * 3 + 4), 1.3 * 2 / (0.3 * 3 + 2), 1.3 * 1 / (0.3 * 3 + 1)]
        assert metric.compute() == pytest.approx(100 * max(candidates))

    def test_equals_precision_and_recall_form(self) -> None:
        generator = torch.Generator().manual_seed(1)
        prediction = torch.randn(2, 2, 16, 16, generator=generator)
        label = torch.randint(0, 2, (2, 16, 16), generator=generator)
        probability = prediction.softmax(1)[:, 1]
        expected = 0.0
        for step in range(1, 20):
            positive = probability >= step / 20
            hits = int((positive & (label == 1)).sum())
            if hits:
                precision, recall = hits / int(positive.sum()), hits / int(label.sum())
                expected = max(expected, 1.3 * precision * recall / (0.3 * precision + recall))
        metric = MaxF()
        metric.update(prediction, label)
        assert metric.compute() == pytest.approx(100 * expected, rel=1e-9)

    def test_probability_equal_to_a_threshold_is_positive(self) -> None:
        metric = MaxF()
        metric.update(torch.zeros(1, 2, 1, 2), row([1, 0]))  # probability exactly .5
        assert metric.compute() == pytest.approx(100 * 1.3 / (0.3 + 2))

    def test_probability_below_all_thresholds_is_negative(self) -> None:
        metric = MaxF()
        metric.update(salient([0.049, 0.96]), row([1, 0]))
        assert metric.compute() == 0.0

    def test_nothing_salient_is_zero(self) -> None:
        metric = MaxF()
        metric.update(salient([0.01, 0.02]), row([0, 0]))
        assert metric.compute() == 0.0

    def test_perfect_is_100(self) -> None:
        metric = MaxF()
        metric.update(salient([0.999, 0.001]), row([1, 0]))
        assert metric.compute() == pytest.approx(100)


class TestBoundaryLoss:
    def test_weights_and_pools(self) -> None:
        metric = BoundaryLoss()
        metric.update(torch.tensor([[[[0.0, 0.0, 5.0]]]]), torch.tensor([[[1.0, 0.0, 255.0]]]))
        metric.update(torch.tensor([[[[2.0]]]]), torch.tensor([[[1.0]]]))
        expected = 0.95 * math.log(2) + 0.05 * math.log(2) + 0.95 * math.log1p(math.exp(-2))
        assert metric.compute() == pytest.approx(expected / 3, rel=1e-12)

    def test_large_logits_stay_finite(self) -> None:
        metric = BoundaryLoss()
        metric.update(torch.tensor([[[[-1e4]]]]), torch.tensor([[[1.0]]]))
        assert metric.compute() == pytest.approx(0.95e4)


class TestAveragePrecision:
    def test_by_hand(self) -> None:
        metric = AveragePrecision()
        metric.update(torch.tensor([[[[0.9, 0.8, 0.7]]]]), torch.tensor([[[1.0, 0.0, 1.0]]]))
        metric.update(torch.tensor([[[[0.1, 0.95]]]]), torch.tensor([[[0.0, 255.0]]]))
        assert metric.compute() == pytest.approx(100 * (1 / 2 * 1 + 1 / 2 * 2 / 3))

    def test_ties_share_one_threshold(self) -> None:
        metric = AveragePrecision()
        metric.update(torch.tensor([[[[9.0, 7.0, -3.0]]]]), torch.tensor([[[0.0, 1.0, 0.0]]]))
        assert metric.compute() == pytest.approx(50)

    def test_equals_torchmetrics(self) -> None:
        generator = torch.Generator().manual_seed(4)
        scores = torch.randint(0, 1000, (1, 1, 40, 50), generator=generator) / 1000 + 0.0005
        label = (torch.rand(1, 40, 50, generator=generator) < scores[:, 0] / 3).float()
        metric = AveragePrecision()
        metric.update(scores, label)
        expected = binary_average_precision(scores[:, 0], label.long())
        assert metric.compute() == pytest.approx(100 * float(expected), rel=1e-5)

    def test_no_positive_is_nan(self) -> None:
        metric = AveragePrecision()
        metric.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2))
        assert math.isnan(metric.compute())


def unlabelled(task: Task) -> Tensor:
    """A label in which no pixel counts."""
    if task.name == "normals":
        return torch.zeros(1, 4, 6, 3)
    if task.name in ("depth", "boundary"):
        return torch.full((1, 4, 6), 0.0 if task.name == "depth" else 255.0)
    return torch.full((1, 4, 6), 255)


@pytest.mark.parametrize("task", SIX_TASKS, ids=lambda task: task.name)
class TestEveryTask:
    def test_all_ignored_is_nan(self, task: Task) -> None:
        metric: TaskMetric = build_metric(task)
        assert math.isnan(metric.compute())
        metric.update(torch.randn(1, task.channels, 4, 6), unlabelled(task))
        assert math.isnan(metric.compute())

    def test_ignored_images_change_nothing(self, task: Task) -> None:
        label = unlabelled(task)
        label[:, 1] = 1
        prediction = torch.randn(1, task.channels, 4, 6, generator=torch.Generator().manual_seed(2))
        alone, mixed = build_metric(task), build_metric(task)
        alone.update(prediction, label)
        for one in (unlabelled(task), label, unlabelled(task)):
            mixed.update(prediction, one)
        assert mixed.compute() == alone.compute()

    def test_batching_does_not_matter(self, task: Task) -> None:
        generator = torch.Generator().manual_seed(3)
        prediction = torch.randn(5, task.channels, 4, 6, generator=generator)
        label = torch.cat([unlabelled(task)] * 5)
        label[:, :3] = torch.randint(0, 2, label[:, :3].shape, generator=generator).to(label.dtype)
        whole, parts = build_metric(task), build_metric(task)
        whole.update(prediction, label)
        for rows in (slice(0, 2), slice(2, 5)):
            parts.update(prediction[rows], label[rows])
        assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_refuses_prediction_that_is_not_finite(self, task: Task, value: float) -> None:
        prediction = torch.zeros(1, task.channels, 4, 6)
        prediction[0, 0, 0, 0] = value
        with pytest.raises(MetricError, match="not finite"):
            build_metric(task).update(prediction, unlabelled(task))


def test_channels_come_from_the_task() -> None:
    metric = build_metric(NYUD_TASKS[0])
    assert isinstance(metric, MeanIoU)
    assert metric.classes == 40


def test_unknown_task() -> None:
    task = Task(name="flow", channels=2, loss_weight=1.0, metric="EPE", lower_is_better=True)
    with pytest.raises(MetricError, match="no metric for task 'flow'"):
        build_metric(task)


def test_mean_average_precision_counts_classes_that_occur() -> None:
    label = torch.tensor([[[0, 1, 1, 255]]])
    perfect = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 2]]]), 3).movedim(-1, 1).float()
    metric = MeanAveragePrecision(3)
    metric.update(perfect, label)
    assert metric.compute() == pytest.approx(100)
    worst = MeanAveragePrecision(3)
    worst.update(1 - perfect, label)
    # class 0: its one pixel ranks last of three (AP 1/3); class 1: ranks 2 and 3 (tied, AP 2/3)
    assert worst.compute() == pytest.approx(100 * (1 / 3 + 2 / 3) / 2)
