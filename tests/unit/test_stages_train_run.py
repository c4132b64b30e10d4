"""Whole runs: both phases, crash and resume, refusals, and what ends on disk."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from stages.data.dataset import Dataset
from stages.progress import NoProgress
from stages.train.checkpoint import CheckpointError
from stages.train.guard import NonFiniteLossError
from stages.train.identity import TrainingRun
from stages.train.run import TrainingError, train
from stages.train.saving import initialise_from, load_student
from stages.train.stem import StudentError
from stages.train.student import build_student
from stages.train.testing import CPU, PHASE, SIZE, STUDENT, make_data, make_store
from store.reader import FeatureStore


class Killed(BaseException):
    """Stands for the end of the process."""


class KillAt(NoProgress):
    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self, count: int = 1, note: str = "") -> None:
        if note:
            self.left -= 1
            if self.left == 0:
                raise Killed


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only get in each other's way on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_data(tmp_path_factory.mktemp("data") / "nyud")


@pytest.fixture(scope="module")
def store(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("store") / "features.zarr", dataset)


Make = Callable[..., TrainingRun]


@pytest.fixture
def make(dataset: Dataset, tmp_path: Path) -> Make:
    def make_run(folder: str, *, tasks: bool = True, **changes: object) -> TrainingRun:
        run = TrainingRun(
            folder=tmp_path / folder,
            image_size=SIZE,
            student=STUDENT,
            teachers=("dino", "sam"),
            tasks=dataset.tasks if tasks else (),
            phase=PHASE,
            runtime=CPU,
        )
        return replace(run, **changes)  # type: ignore[arg-type]

    return make_run


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def without_speed(row: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in row.items() if k not in {"images_per_second", "data_wait"}}


@pytest.mark.parametrize("tasks", [False, True], ids=["distill", "multitask"])
@pytest.mark.parametrize("killed_at", [2, 5])
def test_a_killed_run_ends_as_if_nothing_had_happened(
    make: Make, dataset: Dataset, store: FeatureStore, tasks: bool, killed_at: int
) -> None:
    whole, broken = make("whole", tasks=tasks), make("broken", tasks=tasks)
    train(whole, dataset, store)
    with pytest.raises(Killed):
        train(broken, dataset, store, KillAt(killed_at))
    torch.manual_seed(99)
    np.random.seed(99)
    summary = train(broken, dataset, store)
    assert summary.resumed_at == {2: 0, 5: 3}[killed_at]
    weights = [load_file(run.folder / "student.safetensors") for run in (whole, broken)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    logs = [[without_speed(row) for row in rows(run.folder)] for run in (whole, broken)]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == [2, 4, 6, 7]


def test_multitask_starts_from_the_distilled_student(
    make: Make, dataset: Dataset, store: FeatureStore
) -> None:
    distill = make("distill", tasks=False)
    first = train(distill, dataset, store)
    assert (first.parameters["heads"], first.parameters["routers"]) == (0, 0)
    frozen = PHASE.model_copy(update={"learning_rate": 1e-12, "steps": 1, "warmup_steps": 0})
    multitask = make("multitask", phase=frozen, initialise_from=distill.folder)
    summary = train(multitask, dataset, store)
    assert summary.random_parts == ("routers", "heads")
    before = load_file(distill.folder / "student.safetensors")
    after = load_file(multitask.folder / "student.safetensors")
    assert all(torch.allclose(after[name], value, atol=1e-7) for name, value in before.items())
    assert set(summary.losses) >= {"loss", "distill", "distill_sam", "loss_depth"}


def test_position_embeddings_follow_the_image_size(
    make: Make, dataset: Dataset, store: FeatureStore
) -> None:
    distill = make("distill", tasks=False)
    train(distill, dataset, store)
    channels = {"dino": (16, 32), "sam": (16, 32)}
    larger = build_student(STUDENT, (48, 40), channels, dataset.tasks)
    assert initialise_from(larger, distill.folder) == ("routers", "heads")
    source = load_file(distill.folder / "student.safetensors")["vit.pos_embed"]
    grid = source[:, 1:].reshape(1, 3, 4, 32).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(6, 5), mode="bicubic")
    found = larger.state_dict()["vit.pos_embed"]
    torch.testing.assert_close(found[:, 1:], resized.flatten(2).transpose(1, 2))
    assert found[:, 0].equal(source[:, 0])


def test_starting_from_another_student_is_refused(
    make: Make, dataset: Dataset, store: FeatureStore
) -> None:
    distill = make("distill", tasks=False)
    train(distill, dataset, store)
    with pytest.raises(StudentError, match="of another student"):
        train(make("fewer", teachers=("dino",), initialise_from=distill.folder), dataset, store)
    with pytest.raises(StudentError, match="finish its run"):
        train(make("early", initialise_from=distill.folder.parent), dataset, store)


def test_the_loss_falls(make: Make, dataset: Dataset, store: FeatureStore) -> None:
    phase = PHASE.model_copy(update={"steps": 30, "learning_rate": 5e-3, "jitter": False})
    train(make("run", tasks=False, phase=phase), dataset, store)
    log = rows(make("run").folder)
    assert log[-1]["distill"] < 0.95 * log[0]["distill"]


def test_the_loss_is_the_weighted_sum(make: Make, dataset: Dataset, store: FeatureStore) -> None:
    phase = PHASE.model_copy(update={"alpha": 0.5, "steps": 2})
    losses = train(make("run", phase=phase), dataset, store).losses
    tasks = sum(task.loss_weight * losses[f"loss_{task.name}"] for task in dataset.tasks)
    assert losses["distill"] == pytest.approx(losses["distill_dino"] + losses["distill_sam"])
    assert losses["loss"] == pytest.approx(tasks + 0.5 * losses["distill"])


def test_without_distillation_no_feature_is_read(
    make: Make, dataset: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureStore, "read", None)
    phase = PHASE.model_copy(update={"alpha": 0.0})
    baseline = train(make("baseline", phase=phase), dataset, store)
    assert baseline.parameters["paths"] > 0
    assert baseline.parameters["aligners"] == 0
    plain = train(make("single", teachers=()), dataset, store)
    assert (plain.parameters["paths"], plain.parameters["routers"]) == (0, 0)
    assert not any(name.startswith("distill") for name in plain.losses)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train(
    make: Make, dataset: Dataset, store: FeatureStore, precision: str
) -> None:
    runtime = CPU.model_copy(update={"precision": precision})
    reference = train(make("fp32"), dataset, store).losses["loss"]
    run = make(precision, runtime=runtime)
    assert train(run, dataset, store).losses["loss"] == pytest.approx(reference, rel=0.05)
    weights = load_file(run.folder / "student.safetensors")
    assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float32}


def test_a_finished_student_is_loaded_as_it_was(
    make: Make, dataset: Dataset, store: FeatureStore
) -> None:
    run = make("run")
    summary = train(run, dataset, store)
    student = load_student(run.folder)
    assert not student.training
    assert student.parameter_counts() == summary.parameters
    description = json.loads((run.folder / "student.json").read_text())
    assert description["run"]["store"] == store.digest(("dino", "sam"))
    images = torch.randn(1, 3, *SIZE)
    assert student(images).tasks["depth"].equal(load_student(run.folder)(images).tasks["depth"])
    weights = load_file(run.folder / "student.safetensors")
    del weights["heads.depth.last_conv.bias"]
    save_file(weights, run.folder / "student.safetensors")
    with pytest.raises(StudentError, match=r"depth\.last_conv\.bias: absent there"):
        load_student(run.folder)
    with pytest.raises(StudentError, match="holds no trained student"):
        load_student(run.folder / "nothing")


def test_a_checkpoint_of_another_run_is_refused(
    make: Make, dataset: Dataset, store: FeatureStore
) -> None:
    with pytest.raises(Killed):
        train(make("run"), dataset, store, KillAt(5))
    faster = PHASE.model_copy(update={"learning_rate": 2e-3})
    with pytest.raises(CheckpointError, match=r"phase\.learning_rate: 0\.001 in the checkpoint"):
        train(make("run", phase=faster), dataset, store)
    with pytest.raises(CheckpointError, match=r"build\.student\.router: sak .* sum asked"):
        train(make("run", student=STUDENT.model_copy(update={"router": "sum"})), dataset, store)
    with pytest.raises(CheckpointError, match=r"features\.sam"):
        train(make("run", teachers=("dino",)), dataset, store)
    other_pace = PHASE.model_copy(update={"log_every": 3, "checkpoint_every": 100})
    assert train(make("run", phase=other_pace), dataset, store).resumed_at == 3


def test_a_damaged_checkpoint_is_named(make: Make, dataset: Dataset, store: FeatureStore) -> None:
    run = make("run")
    run.folder.mkdir()
    (run.folder / "checkpoint-00000003.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints .* are damaged"):
        train(run, dataset, store)


def test_a_loss_that_is_not_finite_names_step_and_images(
    make: Make, dataset: Dataset, store: FeatureStore
) -> None:
    phase = PHASE.model_copy(
        update={"learning_rate": 1e30, "gradient_clip": None, "warmup_steps": 0}
    )
    with pytest.raises(NonFiniteLossError, match=r"step \d: .*not finite, on images 00\d\d"):
        train(make("run", phase=phase), dataset, store)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": (), "teachers": ()}, "nothing to learn from"),
        ({"teachers": ("clip",)}, r"no finished features of clip; it has: dino, sam"),
        ({"image_size": (32, 32)}, r"views are \(24, 32\)"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(
    make: Make, dataset: Dataset, store: FeatureStore, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        train(replace(make("run"), **changes), dataset, store)  # type: ignore[arg-type]
    unlabelled = replace(dataset, tasks=dataset.tasks[:1])
    with pytest.raises(TrainingError, match="no labels for depth, normals, boundary"):
        train(make("run"), unlabelled, store)
