"""Settings of the loop: parts of a batch, moving average, what learns, less memory, compiling."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from stages.data.dataset import Dataset
from stages.train import stem
from stages.train.checkpoint import TrainingState
from stages.train.config import PhaseConfig
from stages.train.distributed import Ranks, RanksError
from stages.train.identity import TrainingRun
from stages.train.parts import cut
from stages.train.record import Record
from stages.train.run import prepare, train
from stages.train.saving import load_student
from stages.train.stem import StudentError
from stages.train.stream import Batch, batches
from stages.train.testing import CPU, PHASE, SIZE, STUDENT, TEACHERS
from stages.train.trainable import merged
from store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path: Path) -> TrainingRun:
    return TrainingRun(
        folder=tmp_path / "run",
        image_size=SIZE,
        student=STUDENT,
        teachers=tuple(TEACHERS),
        tasks=(),
        phase=PHASE,
        runtime=CPU,
    )


def changed(run: TrainingRun, **phase: object) -> TrainingRun:
    return replace(run, phase=run.phase.model_copy(update=phase))


def first_gradient(
    run: TrainingRun, dataset: Dataset, store: FeatureStore
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Terms of the first step, and the gradient of every weight that learns."""
    made = prepare(run, dataset, store)
    size = run.phase.batch_size
    batch = next(batches(made.stream, batch_size=size, start=0, stop=1, workers=0, pin=False))
    terms = made.learner.recompute(batch, 0, 0)
    named = made.learner.state.student.named_parameters()
    return terms, {name: weight.grad for name, weight in named if weight.grad is not None}


@pytest.mark.parametrize("asked", [None, 1], ids=["all teachers", "drawn teachers"])
def test_parts_give_the_gradient_of_the_whole_batch(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, asked: int | None
) -> None:
    run = changed(run, teachers_per_image=asked, batch_size=8)
    terms, whole = first_gradient(run, dataset, store)
    for parts in (2, 4, 8):
        found, gradient = first_gradient(changed(run, accumulate=parts), dataset, store)
        assert found == pytest.approx(terms, rel=1e-5)
        assert gradient.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=1e-6)


def test_a_batch_is_cut_without_loss(
    run: TrainingRun, dataset: Dataset, store: FeatureStore
) -> None:
    run = changed(run, teachers_per_image=1)
    made = prepare(replace(run, tasks=dataset.tasks), dataset, store)
    whole = next(batches(made.stream, batch_size=8, start=0, stop=1, workers=0, pin=False))
    parts = cut(whole, 4)
    assert sum((part.ids for part in parts), ()) == whole.ids
    assert torch.cat([part.images for part in parts]).equal(whole.images)
    for task, label in whole.labels.items():
        assert torch.cat([part.labels[task] for part in parts]).equal(label)
    for name, levels in whole.targets.items():
        for k, level in enumerate(levels):
            assert torch.cat([part.targets[name][k] for part in parts]).equal(level)
        assert asking_ids(whole, name) == [one for part in parts for one in asking_ids(part, name)]


def asking_ids(batch: Batch, teacher: str) -> list[str]:
    rows = batch.target_rows[teacher]
    assert rows is not None
    return [batch.ids[row] for row in rows.tolist()]


def test_uneven_parts_are_refused() -> None:
    with pytest.raises(ValidationError, match="a divisor of batch_size 16"):
        PhaseConfig(steps=1, learning_rate=1.0, accumulate=3)
    with pytest.raises(RanksError, match="a multiple of 6, such as 12"):
        Ranks(world=3).share(16, 2)


@pytest.mark.parametrize(
    "setting", [{"ema_decay": 1.0}, {"trainable": "stem"}, {"lora_rank": 0}, {"keep_last": 0}]
)
def test_wrong_settings_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PhaseConfig(steps=1, learning_rate=1.0, **setting)  # type: ignore[arg-type]


def test_the_saved_student_is_the_average(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    record = Record.add

    def keep(self: Record, state: TrainingState, *rest: object) -> None:
        kept.append(state.student.state_dict()["tsap.dino.0.down.weight"].clone())
        record(self, state, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Record, "add", keep)
    train(changed(run, ema_decay=0.6), dataset, store)
    expected = kept[0]
    for value in kept[1:]:
        expected = 0.6 * expected + 0.4 * value
    found = load_student(run.folder).state_dict()["tsap.dino.0.down.weight"]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, kept[-1], rtol=1e-4)
    description = json.loads((run.folder / "student.json").read_text())
    assert description["run"]["weights"] == "average"
    shutil.rmtree(run.folder)
    train(run, dataset, store)
    description = json.loads((run.folder / "student.json").read_text())
    assert description["run"]["weights"] == "last step"


def moved(run: TrainingRun, dataset: Dataset, store: FeatureStore) -> set[str]:
    """Train, and return the parts of the student (and kinds of stem weights) that changed."""
    before = merged(prepare(run, dataset, store).learner.state.student).state_dict()  # type: ignore[arg-type]
    train(run, dataset, store)
    after = load_file(run.folder / "student.safetensors")
    assert after.keys() == before.keys()
    return {name for name, value in before.items() if not after[name].equal(value)}


def test_a_frozen_stem_stays(run: TrainingRun, dataset: Dataset, store: FeatureStore) -> None:
    names = moved(changed(run, trainable="frozen-stem"), dataset, store)
    assert {name.partition(".")[0] for name in names} == {"tsap", "out_norms", "ts_aligners"}


def test_low_rank_changes_are_of_low_rank_and_merged(
    run: TrainingRun, dataset: Dataset, store: FeatureStore
) -> None:
    run = changed(run, trainable="lora-stem", lora_rank=2, ema_decay=0.5)
    before = merged(prepare(run, dataset, store).learner.state.student).state_dict()  # type: ignore[arg-type]
    names = moved(run, dataset, store)
    in_stem = {name for name in names if name.startswith("vit.")}
    assert in_stem
    assert all(name.startswith("vit.blocks.") and name.endswith(".weight") for name in in_stem)
    after = load_file(run.folder / "student.safetensors")
    for name in in_stem:
        singular = torch.linalg.svdvals(after[name] - before[name])
        assert singular[2] < 1e-5 * singular[0] + 1e-7
    assert load_student(run.folder).state_dict().keys() == before.keys()


def test_routers_alone_learn(run: TrainingRun, dataset: Dataset, store: FeatureStore) -> None:
    with pytest.raises(StudentError, match="neither routers nor heads"):
        train(changed(run, trainable="routers"), dataset, store)
    names = moved(replace(changed(run, trainable="routers"), tasks=dataset.tasks), dataset, store)
    assert {name.partition(".")[0] for name in names} == {"mor", "heads"}


def test_activation_checkpointing_gives_the_same_gradients(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(run, tasks=dataset.tasks)
    terms, plain = first_gradient(run, dataset, store)
    calls: list[int] = []
    original = stem.checkpoint

    def counting(*arguments: object, **options: object) -> object:
        calls.append(1)
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stem, "checkpoint", counting)
    saving = replace(run, runtime=CPU.model_copy(update={"activation_checkpointing": True}))
    found, gradient = first_gradient(saving, dataset, store)
    assert len(calls) == 4
    assert found == terms
    assert all(gradient[name].equal(value) for name, value in plain.items())
