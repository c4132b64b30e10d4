"""Linear probes on stores whose features are known to hold, or not to hold, the answer."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stages.data.dataset import Dataset
from stages.data.sources import ImageSource
from stages.data.tasks import NYUD_TASKS, PASCAL_TASKS, Task
from stages.evaluate.features import StoreFeatures
from stages.evaluate.probe import ProbeError, ProbeScore, ProbeTable, probe, probe_metric
from stages.evaluate.probe_inputs import LabelReader, ProbeFeatures, resize, targets
from stages.evaluate.ridge import RidgeRegression
from stages.evaluate.splits import SplitError, labelled_splits
from stages.progress import NoProgress
from store.errors import StoreError
from store.images import ImageTable, ViewTable
from store.reader import FeatureStore
from store.spec import LevelSpec, TeacherSpec
from store.writer import FeatureWriter, create_store

TASKS = {task.name: task for task in (*PASCAL_TASKS, *NYUD_TASKS)}
SIZE = (16, 24)
GRID = (4, 6)
CPU = torch.device("cpu")
TRAIN = tuple(f"t{number}" for number in range(12))
VAL = tuple(f"v{number}" for number in range(4))


class ArrayDataset(Dataset):
    """Labels from memory, already in the view."""

    arrays: ClassVar[dict[str, dict[str, npt.NDArray[Any]]]] = {}

    def labels(
        self, image_id: str, image_size: tuple[int, int] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        assert image_size == SIZE
        return {task.name: self.arrays[image_id][task.name] for task in self.tasks}


def dataset(*tasks: str, classes: int = 3) -> ArrayDataset:
    """Labels constant in cells of 4 x 4; segmentation has `classes` and 255."""
    generator = np.random.default_rng(0)
    ArrayDataset.arrays = {}
    for name in (*TRAIN, *VAL):
        vectors = generator.normal(size=(*GRID, 3)).astype(np.float32)
        cells = {
            "segmentation": generator.choice([*range(classes), 255], GRID),
            "parts": generator.integers(0, 7, GRID),
            "saliency": generator.integers(0, 2, GRID),
            "depth": generator.choice([0, 1, 2, 5], GRID).astype(np.float32),
            "normals": vectors / np.linalg.norm(vectors, axis=-1, keepdims=True),
            "boundary": generator.integers(0, 2, GRID).astype(np.float32),
        }
        ArrayDataset.arrays[name] = {
            task: values.repeat(4, 0).repeat(4, 1) for task, values in cells.items()
        }
    return ArrayDataset(
        images=tuple(ImageSource(id=n, path=Path(n)) for n in (*TRAIN, *VAL)),
        splits={"train": TRAIN, "val": VAL},
        tasks=tuple(TASKS[task] for task in tasks),
    )


def knowing(image_id: str, task: str) -> npt.NDArray[np.float32]:
    """Features `h w C` from which the task's labels follow linearly, mixed and shifted."""
    cells = torch.from_numpy(ArrayDataset.arrays[image_id][task][::4, ::4][None])
    answer, _ = targets(TASKS[task], cells)
    mixed = (
        answer[0].numpy()
        @ np.linspace(-1, 2, answer.shape[-1] ** 2).reshape(answer.shape[-1], -1).round(1)
        + 3 * answer[0].numpy()
    )
    return np.concatenate([mixed + 5, np.full((*GRID, 1), 7)], axis=-1).astype(np.float32)


def noise(image_id: str, grid: tuple[int, int] = GRID) -> npt.NDArray[np.float32]:
    seed = int.from_bytes(image_id.encode(), "big")
    return np.random.default_rng(seed).normal(size=(*grid, 3)).astype(np.float32)


def write_store(
    path: Path,
    teachers: Mapping[str, Mapping[str, Mapping[str, npt.NDArray[np.float32]]]],
    bad: tuple[str, ...] = (),
) -> FeatureStore:
    """Write teacher -> level -> image id -> features."""
    ids = (*VAL, *TRAIN)  # another order than the data set's: rows are joined by id
    count = len(ids)
    images = ImageTable(
        ids=ids,
        sha256=("1" * 64,) * count,
        heights=(SIZE[0],) * count,
        widths=(SIZE[1],) * count,
        statuses=tuple("empty file" if name in bad else "ok" for name in ids),
    )
    views = ViewTable(
        image_size=SIZE,
        boxes=np.tile([0, 0, *SIZE], (count, 1)),
        flips=np.zeros(count, bool),
        seeds=np.zeros(count, np.uint64),
    )
    create_store(path, images, views)
    valid = np.array([name not in bad for name in ids])
    for teacher, levels in teachers.items():
        arrays = {
            level: np.stack([features[name] for name in ids]) for level, features in levels.items()
        }
        spec = TeacherSpec(
            name=teacher,
            levels=tuple(
                LevelSpec(name=level, grid=array.shape[1:3], channels=array.shape[3])
                for level, array in arrays.items()
            ),
            global_channels=None,
            provenance={},
        )
        with FeatureWriter.open(path, spec) as writer:
            for rows in writer.missing():
                part = {level: array[rows.start : rows.stop] for level, array in arrays.items()}
                writer.write(rows, part, None, valid[rows.start : rows.stop])
            writer.finish()
    return FeatureStore(path)


def run(store: FeatureStore, data: Dataset, batch_size: int = 5) -> ProbeTable:
    return probe(
        StoreFeatures(store, CPU),
        data,
        labelled_splits(store, data, tuple(store.teachers)),
        ridge=1e-6,
        batch_size=batch_size,
        image_size=SIZE,
        device=CPU,
        progress=NoProgress(),
    )


def level(task: str | None, grid: tuple[int, int] = GRID) -> dict[str, npt.NDArray[np.float32]]:
    names = (*TRAIN, *VAL)
    return {name: knowing(name, task) if task else noise(name, grid) for name in names}


@pytest.mark.parametrize(
    ("task", "perfect", "tolerance"),
    [
        ("segmentation", 100.0, 1e-9),
        ("parts", 100.0, 1e-9),
        ("saliency", 100.0, 1e-9),
        ("depth", 0.0, 0.02),
        ("normals", 0.0, 0.2),
        ("boundary", 100.0, 1e-9),
    ],
)
def test_a_teacher_that_knows_wins(
    tmp_path: Path, task: str, perfect: float, tolerance: float
) -> None:
    data = dataset(task)
    teachers = {"a_blind": {"only": level(None)}, "b_knowing": {"only": level(task)}}
    table = run(write_store(tmp_path / "store", teachers), data)
    values = {score.teacher: score.value for score in table.scores}
    assert values["b_knowing"] == pytest.approx(perfect, abs=tolerance)
    assert abs(values["a_blind"] - perfect) > 0.5
    assert table.best()[task].teacher == "b_knowing"
    assert (table.train_images, table.val_images) == (len(TRAIN), len(VAL))


def test_levels_and_their_concatenation(tmp_path: Path) -> None:
    data = dataset("saliency", "depth")
    teachers = {"both": {"early": level("saliency"), "late": level("depth")}}
    table = run(write_store(tmp_path / "store", teachers), data)
    values = {(score.level, score.task): score.value for score in table.scores}
    assert len(values) == 3 * 2
    assert values["early", "saliency"] == values["all", "saliency"] == 100
    assert values["late", "saliency"] < 90
    assert values["all", "depth"] == pytest.approx(0, abs=0.02)
    assert values["early", "depth"] > 1
    assert table.best()["saliency"].level == "early"  # a tie goes to the first


def test_result_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    data = dataset("segmentation", "depth")
    store = write_store(tmp_path / "store", {"one": {"only": level(None)}})
    first, second = run(store, data, 1), run(store, data, 16)
    for one, other in zip(first.scores, second.scores, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4)


def test_coarse_and_fine_grids_meet_on_one_raster(tmp_path: Path) -> None:
    data = dataset("saliency")
    levels = {
        "fine": level(None, (8, 12)),
        "middle": level("saliency"),
        "coarse": level(None, (2, 3)),
    }
    store = write_store(tmp_path / "store", {"pyramid": levels})
    features = ProbeFeatures(StoreFeatures(store, CPU))
    assert features.grids["pyramid", "all"] == GRID
    assert features.read(TRAIN[:2])["pyramid", "all"].shape == (2, *GRID, 3 + 3 + 3 + 1)
    table = run(store, data)
    assert {score.level for score in table.scores} == {"fine", "middle", "coarse", "all"}
    assert table.best()["saliency"].level == "middle"


def test_features_are_standardised_with_a_constant_last(tmp_path: Path) -> None:
    dataset("depth")
    store = write_store(tmp_path / "store", {"one": {"only": level("depth")}})
    read = ProbeFeatures(StoreFeatures(store, CPU)).read((*TRAIN, *VAL))
    features = read["one", "only"].flatten(0, 2)
    torch.testing.assert_close(features[:, 0].mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(features[:, 0].std(), torch.tensor(1.0), atol=1e-2, rtol=0)
    assert (features[:, 1] == 0).all()  # a channel that never changes
    assert (features[:, 2] == 1).all()


def test_quarantined_images_are_left_out(tmp_path: Path) -> None:
    data = dataset("saliency")
    store = write_store(
        tmp_path / "store", {"one": {"only": level("saliency")}}, bad=("t0", "v1", "v2")
    )
    table = run(store, data)
    assert (table.train_images, table.val_images) == (len(TRAIN) - 1, len(VAL) - 2)


def test_task_that_is_never_labelled_is_nan(tmp_path: Path) -> None:
    data = dataset("segmentation", "saliency")
    for arrays in ArrayDataset.arrays.values():
        arrays["segmentation"] = np.full(SIZE, 255)
    table = run(write_store(tmp_path / "store", {"one": {"only": level("saliency")}}), data)
    assert math.isnan(table.scores[0].value)
    assert set(table.best()) == {"saliency"}
    values = json.loads(json.dumps(table.as_json(), allow_nan=False))
    assert values["scores"]["one"]["only"] == {"segmentation": None, "saliency": 100.0}


def test_json(tmp_path: Path) -> None:
    data = dataset("boundary", "depth")
    table = run(write_store(tmp_path / "store", {"one": {"only": level("depth")}}), data)
    values = json.loads(json.dumps(table.as_json()))
    assert values["metrics"] == {"boundary": "AP", "depth": "RMSE"}
    assert values["lower_is_better"] == {"boundary": False, "depth": True}
    assert values["images"] == {"train": 12, "val": 4}
    assert values["best"]["depth"]["teacher"] == "one"


def test_best_is_the_lowest_where_lower_is_better() -> None:
    scores = tuple(
        ProbeScore(teacher=name, level="all", task="depth", value=value)
        for name, value in (("a", 0.5), ("b", math.nan), ("c", 0.3), ("d", 0.4))
    )
    table = ProbeTable(
        scores=scores,
        metrics={"depth": "RMSE"},
        lower_is_better={"depth": True},
        train_images=1,
        val_images=1,
        ridge=1e-3,
    )
    assert table.best()["depth"].teacher == "c"


def test_nothing_to_probe(tmp_path: Path) -> None:
    data = dataset("depth")
    empty = write_store(tmp_path / "empty", {})
    with pytest.raises(ProbeError, match=r"got \[\] and \['depth'\]"):
        run(empty, data)
    store = write_store(tmp_path / "store", {"one": {"only": level("depth")}})
    with pytest.raises(ProbeError, match=r"got \['one'\] and \[\]"):
        run(store, dataset())


def test_split_without_valid_image(tmp_path: Path) -> None:
    data = dataset("depth")
    store = write_store(tmp_path / "store", {"one": {"only": level("depth")}}, bad=VAL)
    with pytest.raises(SplitError, match="no image of split 'val'"):
        run(store, data)


def test_store_of_other_images(tmp_path: Path) -> None:
    data = dataset("depth")
    store = write_store(tmp_path / "store", {"one": {"only": level("depth")}})
    other = ArrayDataset(
        images=data.images, splits={"train": ("stranger",), "val": VAL}, tasks=data.tasks
    )
    with pytest.raises(StoreError, match="'stranger' is not in"):
        run(store, other)


class TestTargets:
    def target(self, task: str, label: npt.NDArray[Any]) -> tuple[list[Any], list[Any]]:
        values, valid = targets(TASKS[task], torch.from_numpy(label[None, None]))
        return values[0, 0].tolist(), valid[0, 0].tolist()

    def test_classes(self) -> None:
        values, valid = self.target("saliency", np.array([1, 0, 255]))
        assert values[:2] == [[0, 1], [1, 0]]
        assert valid == [True, True, False]

    def test_depth(self) -> None:
        values, valid = self.target("depth", np.array([2.5, 0, 80], np.float32))
        assert values[0] == [2.5]
        assert valid == [True, False, False]

    def test_normals(self) -> None:
        values, valid = self.target("normals", np.array([[0, 0, -1], [0, 0, 0]], np.float32))
        assert values[0] == [0, 0, -1]
        assert valid == [True, False]

    def test_boundary(self) -> None:
        _, valid = self.target("boundary", np.array([1, 0, 255], np.float32))
        assert valid == [True, True, False]


def test_labels_on_a_grid() -> None:
    data = dataset("segmentation", "boundary")
    thin = np.zeros(SIZE, np.float32)
    thin[5, 9] = 1  # one pixel makes its whole cell a boundary
    ArrayDataset.arrays["t0"]["boundary"] = thin
    labels = LabelReader(data, ["t0"], SIZE)
    expected = torch.zeros(1, *GRID)
    expected[0, 1, 2] = 1
    assert torch.equal(labels.on("boundary", GRID), expected)
    cells = ArrayDataset.arrays["t0"]["segmentation"][::4, ::4]
    assert np.array_equal(labels.on("segmentation", GRID)[0].numpy(), cells)


def test_resize_averages_when_coarser_and_keeps_constants() -> None:
    x = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(1, 1, 4, 1).repeat(1, 4, 1, 1)
    assert resize(x, (1, 1)).item() == pytest.approx(3.0)
    assert resize(x, (4, 4)) is x
    ones = torch.ones(1, 3, 5, 2)
    torch.testing.assert_close(resize(ones, (7, 4)), torch.ones(1, 7, 4, 2))


class TestRidgeRegression:
    def problem(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(300, 5, generator=generator)
        x[:, -1] = 1
        y = x @ torch.randn(5, 2, generator=generator)
        return x, y + 0.1 * torch.randn(300, 2, generator=generator)

    def test_equals_least_squares_without_penalty(self) -> None:
        x, y = self.problem()
        regression = RidgeRegression(5, 2, CPU)
        for start in range(0, 300, 70):
            regression.add(x[start : start + 70], y[start : start + 70])
        expected = np.linalg.lstsq(x.double().numpy(), y.double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(regression.solve(1e-12).numpy(), expected, rtol=1e-4)

    def test_penalty_enters_as_extra_rows(self) -> None:
        x, y = self.problem()
        regression = RidgeRegression(5, 2, CPU)
        regression.add(x, y)
        penalty = math.sqrt(0.3 * 300) * np.eye(5)[:4]  # the constant goes free
        stacked = np.concatenate([x.double().numpy(), penalty])
        expected = np.linalg.lstsq(stacked, np.pad(y.numpy(), ((0, 4), (0, 0))), rcond=None)[0]
        np.testing.assert_allclose(regression.solve(0.3).numpy(), expected, rtol=1e-4)

    def test_dependent_features_are_no_problem(self) -> None:
        x, y = self.problem()
        x[:, 1] = x[:, 0]
        regression = RidgeRegression(5, 2, CPU)
        regression.add(x, y)
        weights = regression.solve(1e-6)
        torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=0)

    def test_nothing_counted(self) -> None:
        with pytest.raises(ValueError, match="at least one labelled token"):
            RidgeRegression(5, 2, CPU).solve(1.0)


def test_unknown_task_has_no_probe() -> None:
    flow = Task(name="flow", channels=2, loss_weight=1.0, metric="EPE", lower_is_better=True)
    with pytest.raises(ValueError, match="no metric for task 'flow'"):
        probe_metric(flow)
