"""Whole evaluations with students whose predictions are known."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from stages.data.dataset import Dataset
from stages.data.sources import ImageSource, SourceError
from stages.data.tasks import NYUD_TASKS, PASCAL_TASKS, Task
from stages.evaluate.checks import MetricError
from stages.evaluate.pictures import router_gates, save_predictions, save_router_gates
from stages.evaluate.run import EvaluationError, evaluate
from stages.progress import NoProgress
from stages.train.config import StudentConfig
from stages.train.student import Student, StudentOutput, build_student

SIX_TASKS = tuple({task.name: task for task in (*PASCAL_TASKS, *NYUD_TASKS)}.values())
SIZE = (8, 8)
CPU = torch.device("cpu")


class Oracle(Student):
    """A student that computes its outputs from the pixels, `B 3 H W` in 0..1."""

    def __init__(
        self, outputs: Callable[[Tensor], dict[str, Tensor]], names: tuple[str, ...]
    ) -> None:
        nn.Module.__init__(self)
        self.outputs, self.task_names = outputs, names
        self.image_size, self.mean, self.std = SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.anchor = nn.Parameter(torch.zeros(1))
        self.batches: list[int] = []

    def forward(self, images: Tensor, distillation: bool = True) -> StudentOutput:
        assert not distillation
        assert not self.training
        self.batches.append(len(images))
        return StudentOutput(paths={}, tasks=self.outputs(images))


def red(images: Tensor) -> Tensor:
    """The classes that `layout` paints: red, in steps of 5 of 255."""
    return (images[:, 0] * 51).round().long()


def segment(images: Tensor) -> dict[str, Tensor]:
    return {"segmentation": F.one_hot(red(images), 40).movedim(-1, 1).float()}


def layout(root: Path, images: int = 3) -> Dataset:
    """Images of 8 x 16, classes in red; the view is the middle, with every class and unlabelled 0."""
    (root / "images").mkdir(parents=True)
    (root / "segmentation").mkdir()
    (root / "depth").mkdir()
    generator = np.random.default_rng(0)
    names = tuple(f"image{number}" for number in range(images))
    for name in names:
        classes = generator.integers(0, 41, (8, 16), dtype=np.uint8)
        classes[:, 4:12] = generator.permutation(np.arange(64) % 41).reshape(8, 8)
        red_only = np.stack([(classes.clip(min=1) - 1) * 5, classes * 0, classes * 0], axis=-1)
        Image.fromarray(red_only).save(root / "images" / f"{name}.png")
        Image.fromarray(classes).save(root / "segmentation" / f"{name}.png")
        np.save(root / "depth" / f"{name}.npy", np.full((8, 16), 2.0, np.float32))
    return Dataset(
        images=tuple(ImageSource(id=n, path=root / "images" / f"{n}.png") for n in names),
        splits={"train": names[:1], "val": names},
        tasks=(NYUD_TASKS[0], NYUD_TASKS[1]),
        label_root=root,
    )


def run(student: Student, dataset: Dataset, split: str = "val") -> dict[str, float]:
    return evaluate(
        student,
        dataset,
        split,
        SIZE,
        device=CPU,
        precision="fp32",
        batch_size=2,
        progress=NoProgress(),
    )


def test_labels_meet_predictions_in_the_view(tmp_path: Path) -> None:
    student = Oracle(segment, ("segmentation",))
    assert run(student, layout(tmp_path)) == {"segmentation": 100.0}
    assert student.batches == [2, 1]


def test_a_shifted_prediction_is_noticed(tmp_path: Path) -> None:
    student = Oracle(lambda x: segment(x.roll(1, dims=-1)), ("segmentation",))
    assert run(student, layout(tmp_path))["segmentation"] < 20


def test_only_common_tasks_are_measured(tmp_path: Path) -> None:
    student = Oracle(
        lambda x: {"depth": x[:, :1] * 0 + 2.5, "parts": x}, ("depth", "parts", "normals")
    )
    assert run(student, layout(tmp_path)) == {"depth": pytest.approx(0.5)}


def test_progress_covers_the_split(tmp_path: Path) -> None:
    seen: list[tuple[str, int] | int] = []

    class Recorder(NoProgress):
        def start(self, label: str, total: int) -> None:
            seen.append((label, total))

        def advance(self, count: int = 1, note: str = "") -> None:
            seen.append(count)

    evaluate(
        Oracle(segment, ("segmentation",)),
        layout(tmp_path),
        "val",
        SIZE,
        device=CPU,
        precision="bf16",
        batch_size=2,
        progress=Recorder(),
    )
    assert seen == [("evaluate val", 3), 2, 1]


def test_no_common_task(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"\['parts'\].*\['segmentation', 'depth'\]"):
        run(Oracle(segment, ("parts",)), layout(tmp_path))


def test_another_number_of_classes(tmp_path: Path) -> None:
    student = Oracle(lambda x: {"segmentation": x}, ("segmentation",))
    with pytest.raises(EvaluationError, match="3 channels for segmentation, the data set has 40"):
        run(student, layout(tmp_path))


def test_diverged_student(tmp_path: Path) -> None:
    student = Oracle(lambda x: {"depth": x[:, :1] / 0}, ("depth",))
    with pytest.raises(MetricError, match="not finite"):
        run(student, layout(tmp_path))


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no split 'test'"):
        run(Oracle(segment, ("segmentation",)), layout(tmp_path), "test")


def test_unreadable_image_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = layout(tmp_path)
    (tmp_path / "images" / "image1.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert run(Oracle(segment, ("segmentation",)), dataset) == {"segmentation": 100.0}
    assert "1 of 3 images of split 'val' cannot be read" in caplog.text
    assert "image1" in caplog.text


def test_no_readable_image(tmp_path: Path) -> None:
    dataset = layout(tmp_path, images=1)
    (tmp_path / "images" / "image0.png").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match="none of the 1 images"):
        run(Oracle(segment, ("segmentation",)), dataset)


def test_task_without_labelled_pixel_is_nan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = layout(tmp_path)
    for path in (tmp_path / "depth").iterdir():
        np.save(path, np.zeros((8, 16), np.float32))
    student = Oracle(lambda x: {"depth": x[:, :1]}, ("depth",))
    with caplog.at_level(logging.WARNING):
        assert math.isnan(run(student, dataset)["depth"])
    assert "depth has no labelled pixel" in caplog.text


def six_task_dataset(root: Path, images: int, size: tuple[int, int]) -> Dataset:
    """Noise with a bright disc that is nearer, salient, of class 1 and part 1."""
    for folder in ("images", "segmentation", "depth", "normals", "edge", "saliency", "parts"):
        (root / folder).mkdir(parents=True)
    y, x = np.mgrid[: size[0], : size[1]] / np.array(size)[:, None, None]
    generator = np.random.default_rng(1)
    names = tuple(f"scene/{number}".replace("/", "-") for number in range(images))
    for number, name in enumerate(names):
        radius = np.hypot(y - 0.4 - 0.1 * number, x - 0.5)
        disc, rim = radius < 0.25, np.abs(radius - 0.25) < 0.02
        picture = generator.integers(0, 120, (*size, 3)) + 120 * disc[..., None]
        vectors = np.stack([x - 0.5, y - 0.5, -np.ones(size)], axis=-1)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        bands = 2 + (6 * x).astype(int) * (y > 0.2)
        files = {
            "images": picture,
            "segmentation": np.where(disc, 1, bands) * (y < 0.95),
            "normals": (vectors + 1) * 127.5,
            "edge": 255 * rim,
            "saliency": 255 * disc,
            "parts": (1 + (5 * y)) * disc,
        }
        for folder, values in files.items():
            Image.fromarray(values.astype(np.uint8)).save(root / folder / f"{name}.png")
        depth = np.where(disc, 1.5, 2 + 3 * (1 - y)) * (x > 0.05)
        np.save(root / "depth" / f"{name}.npy", depth.astype(np.float32))
    return Dataset(
        images=tuple(ImageSource(id=n, path=root / "images" / f"{n}.png") for n in names),
        splits={"train": names, "val": names},
        tasks=SIX_TASKS,
        label_root=root,
    )


def small_student(tasks: tuple[Task, ...], size: tuple[int, int], teachers: int) -> Student:
    config = StudentConfig(
        model="vit_tiny_patch16_224",
        model_args={"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
    )
    names = ("dino", "clip", "sam")[:teachers]
    torch.manual_seed(0)
    return build_student(config, size, dict.fromkeys(names, (32,) * 4), tasks).eval()


def test_real_student_on_all_tasks(tmp_path: Path) -> None:
    size = (32, 48)
    dataset = six_task_dataset(tmp_path, 2, size)
    student = small_student(SIX_TASKS, size, teachers=2)
    results = evaluate(
        student,
        dataset,
        "val",
        size,
        device=CPU,
        precision="fp32",
        batch_size=1,
        progress=NoProgress(),
    )
    assert list(results) == [task.name for task in SIX_TASKS]
    assert all(math.isfinite(value) for value in results.values())


class TestPictures:
    def test_sheet_of_predictions(self, tmp_path: Path) -> None:
        size = (32, 48)
        dataset = six_task_dataset(tmp_path / "data", 2, size)
        student = small_student(SIX_TASKS, size, teachers=0)
        path = tmp_path / "sheets" / "predictions.png"
        shown = save_predictions(student, dataset, dataset.split("val"), path)
        assert shown == tuple(task.name for task in SIX_TASKS)
        with Image.open(path) as sheet:
            assert sheet.format == "PNG"
            assert sheet.width > 7 * 200
        assert [file.name for file in path.parent.iterdir()] == ["predictions.png"]

    def test_nothing_to_show(self, tmp_path: Path) -> None:
        dataset = layout(tmp_path)
        with pytest.raises(ValueError, match="got 0 images"):
            save_predictions(Oracle(segment, ("segmentation",)), dataset, [], tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"student for \['parts'\]"):
            save_predictions(Oracle(segment, ("parts",)), dataset, ["image0"], tmp_path / "a.png")

    def test_router_gates(self, tmp_path: Path) -> None:
        size = (32, 48)
        dataset = six_task_dataset(tmp_path / "data", 2, size)
        student = small_student(SIX_TASKS[:2], size, teachers=3)
        gates = router_gates(student, dataset, dataset.split("val"))
        assert {task: tuple(share.shape) for task, share in gates.items()} == {
            task.name: (4, 4) for task in SIX_TASKS[:2]
        }
        torch.testing.assert_close(gates["parts"].sum(-1), torch.ones(4))
        save_router_gates(gates, student.teachers, tmp_path / "gates.png")
        with Image.open(tmp_path / "gates.png") as heat_map:
            assert heat_map.format == "PNG"

    def test_student_without_routers_has_no_gates(self, tmp_path: Path) -> None:
        size = (32, 48)
        dataset = six_task_dataset(tmp_path / "data", 1, size)
        student = small_student(SIX_TASKS[:1], size, teachers=0)
        gates = router_gates(student, dataset, dataset.split("val"))
        assert gates == {}
        with pytest.raises(ValueError, match="no routers"):
            save_router_gates(gates, (), tmp_path / "gates.png")
