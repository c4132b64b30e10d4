"""Students trained from one stream are, byte for byte, those trained alone."""

import csv
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.data.dataset import Dataset
from stages.progress import NoProgress
from stages.train.guard import NonFiniteLossError
from stages.train.identity import TrainingRun
from stages.train.run import train, train_together
from stages.train.step import Step
from stages.train.testing import CPU, PHASE, SIZE, STUDENT
from stages.train.together import TogetherError
from store.reader import FeatureStore

NAMES = ("plain", "small", "one")
SPEED = {"images_per_second", "data_wait"}


class Killed(BaseException):
    """Stands for the end of the process."""


class KillAt(NoProgress):
    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self, count: int = 1, note: str = "") -> None:
        self.left -= bool(note)
        if self.left == 0:
            raise Killed


pytestmark = pytest.mark.usefixtures("one_thread")


def three(folder: Path, dataset: Dataset, tasks: bool) -> list[TrainingRun]:
    """Runs that differ in student, phase and teachers."""
    plain = TrainingRun(
        folder=folder / "plain",
        image_size=SIZE,
        student=STUDENT,
        teachers=("dino", "sam"),
        tasks=dataset.tasks if tasks else (),
        phase=PHASE,
        runtime=CPU,
    )
    small = STUDENT.model_copy(update={"adapter_ratio": 8, "model_args": {
        **STUDENT.model_args, "embed_dim": 16, "drop_rate": 0.1, "pos_drop_rate": 0.1}})  # fmt: skip
    lora = {"trainable": "lora-stem", "ema_decay": 0.7, "checkpoint_every": 2, "accumulate": 2}
    runs = [
        plain,
        replace(plain, folder=folder / "small", student=small, phase=changed(learning_rate=3e-4)),
        replace(plain, folder=folder / "one", teachers=("sam",), phase=changed(**lora)),
    ]
    for run in runs:
        run.folder.mkdir(parents=True)
    return runs


def changed(**phase: object) -> Any:
    return PHASE.model_copy(update=phase)


def left(folder: Path) -> tuple[bytes, dict[str, Any], list[dict[str, str]]]:
    """What a finished run left: student, newest checkpoint, log without speed."""
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    log = [{k: v for k, v in row.items() if k not in SPEED} for row in rows]
    newest = max(folder.glob("checkpoint-*.pt"))
    kept = torch.load(newest, weights_only=True)
    return (folder / "student.safetensors").read_bytes(), kept, log


def assert_same(one: Path, other: Path) -> None:
    (student, kept, log), (student_2, kept_2, log_2) = left(one), left(other)
    assert student == student_2
    assert log == log_2
    assert kept.keys() == kept_2.keys()
    for part in ("student", "average"):
        if kept[part] is not None:
            assert all(torch.equal(v, kept_2[part][k]) for k, v in tensors(kept[part]))
    assert kept["step"] == kept_2["step"] == PHASE.steps


def tensors(values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in values.items() if isinstance(value, Tensor))


@pytest.fixture(scope="module", params=[False, True], ids=["distill", "multitask"])
def alone(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    dataset: Dataset,
    store: FeatureStore,
) -> tuple[bool, Path]:
    folder = tmp_path_factory.mktemp("alone")
    for run in three(folder, dataset, request.param):
        train(run, dataset, store)
    return request.param, folder


def test_each_student_is_the_one_trained_alone(
    alone: tuple[bool, Path], tmp_path: Path, dataset: Dataset, store: FeatureStore
) -> None:
    train_together(three(tmp_path, dataset, alone[0]), dataset, store)
    for name in NAMES:
        assert_same(tmp_path / name, alone[1] / name)


def test_killed_and_resumed_with_one_behind_another(
    alone: tuple[bool, Path], tmp_path: Path, dataset: Dataset, store: FeatureStore
) -> None:
    """At the kill, checkpoints are of steps 3, 3 and 4; then one loses all of its."""
    runs = three(tmp_path, dataset, alone[0])
    with pytest.raises(Killed):
        train_together(runs, dataset, store, KillAt(5))
    assert not list(tmp_path.glob("*/checkpoint-00000005.pt"))
    for path in runs[1].folder.glob("checkpoint-*.pt"):
        path.unlink()
    summaries = train_together(runs, dataset, store)
    assert [one.resumed_at for one in summaries] == [3, 0, 4]
    for name in NAMES:
        assert_same(tmp_path / name, alone[1] / name)


def test_one_that_is_not_finite_ends_and_the_others_go_on(
    alone: tuple[bool, Path],
    tmp_path: Path,
    dataset: Dataset,
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Step, "gradient", _spoiled(Step.gradient))
    with pytest.raises(NonFiniteLossError, match=r"1 of 3 students.*\nsmall: step 4: loss"):
        train_together(three(tmp_path, dataset, alone[0]), dataset, store)
    for name in ("plain", "one"):
        assert_same(tmp_path / name, alone[1] / name)
    assert (tmp_path / "small" / "not-finite-00000004.pt").is_file()
    assert (tmp_path / "small" / "checkpoint-00000004.pt").is_file()
    assert not (tmp_path / "small" / "student.json").exists()


def _spoiled(original: Callable[..., Any]) -> Callable[..., Any]:
    def gradient(self: Step, batch: Any, step: int, *rest: Any) -> Any:
        terms = original(self, batch, step, *rest)
        if step == 4 and self._phase.learning_rate == 3e-4:
            terms["loss"] = terms["loss"] * float("nan")
        return terms

    return gradient


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", 2), ("shuffle_window", 1), ("steps", 9), ("jitter", False)]
)
def test_what_is_read_must_agree(
    key: str, value: object, tmp_path: Path, dataset: Dataset, store: FeatureStore
) -> None:
    runs = three(tmp_path, dataset, False)
    runs[2] = replace(runs[2], phase=changed(**{key: value}))
    told = f"small and one .*{key} is {getattr(PHASE, key)} in small, {value} in one"
    with pytest.raises(TogetherError, match=told):
        train_together(runs, dataset, store)
    shutil.rmtree(tmp_path)
