"""What stops a run leaves it whole: bad numbers, lost shards, full memory, damaged checkpoints."""

import csv
import io
import logging
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from stages.data.dataset import Dataset
from stages.progress import NoProgress
from stages.stopping import Stop, Terminated
from stages.train import learner
from stages.train.checkpoint import CheckpointError
from stages.train.guard import NonFiniteLossError, OutOfMemoryError, ReplayError
from stages.train.identity import TrainingRun
from stages.train.keeping import NoSuchColumnError
from stages.train.replay import replay
from stages.train.run import train
from stages.train.step import Step, loss_columns
from stages.train.stream import Batch
from stages.train.testing import CPU, PHASE, SIZE, STUDENT, TEACHERS
from stages.train.trackers import TrackerError
from store.errors import StoreError
from store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path: Path, dataset: Dataset) -> TrainingRun:
    return TrainingRun(
        folder=tmp_path / "run",
        image_size=SIZE,
        student=STUDENT,
        teachers=tuple(TEACHERS),
        tasks=dataset.tasks,
        phase=PHASE,
        runtime=CPU,
    )


def changed(run: TrainingRun, **phase: object) -> TrainingRun:
    return replace(run, phase=run.phase.model_copy(update=phase))


def checkpoints(run: TrainingRun) -> list[int]:
    return sorted(int(path.stem[-8:]) for path in run.folder.glob("checkpoint-*.pt"))


def at_step(number: int, action: Callable[[Any], None]) -> Callable[..., Any]:
    """Return a `Step.gradient` that does something to the batch of one step (zero-based)."""
    original = Step.gradient

    def gradient(self: Step, batch: Batch, step: int, *rest: Any) -> Any:
        if step == number:
            action(batch)
        return original(self, batch, step, *rest)

    return gradient


def spoil(batch: Batch) -> None:
    batch.images[0, 0, 0, 0] = float("nan")


@pytest.fixture
def whole(run: TrainingRun, dataset: Dataset, store: FeatureStore) -> bytes:
    folder = run.folder.with_name("whole")
    train(replace(run, folder=folder), dataset, store)
    return (folder / "student.safetensors").read_bytes()


def test_a_step_that_is_not_finite_is_saved_replayed_and_leaves_no_trace(
    run: TrainingRun,
    dataset: Dataset,
    store: FeatureStore,
    whole: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Step, "gradient", at_step(4, spoil))
        with pytest.raises(NonFiniteLossError, match=r"step 4: loss, .*gradient_norm not finite"):
            train(run, dataset, store)
    saved = run.folder / "not-finite-00000004.pt"
    assert saved.is_file()
    assert checkpoints(run) == [3, 4]
    terms = replay(run, dataset, store, saved)
    assert not math.isfinite(terms["loss"])
    assert not math.isfinite(terms["gradient_norm"])
    payload = torch.load(saved, weights_only=True)
    assert len(payload["batch"]["ids"]) == 4
    assert all(weight.isfinite().all() for weight in payload["weights"].values())
    payload["batch"]["images"].nan_to_num_()
    torch.save(payload, saved)
    healed = replay(run, dataset, store, saved)
    assert healed["gradient_norm"] > 0
    assert {"loss", "loss_depth", "distill_dino", "distill_dino.1"} <= healed.keys()
    # the batch norm statistics that the bad batch spoiled are those of the last finished step
    train(run, dataset, store)
    assert (run.folder / "student.safetensors").read_bytes() == whole


def test_a_replayed_step_is_the_one_that_was_refused(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the noise of the routers: the random numbers of a step follow from its number."""
    seen: list[dict[str, float]] = []

    def refuse(values: dict[str, float]) -> list[str]:
        seen.append(dict(values))
        return ["loss"] if len(seen) == 3 else []

    with monkeypatch.context() as patch:
        patch.setattr(learner, "not_finite", refuse)
        with pytest.raises(NonFiniteLossError, match="step 2"):
            train(changed(run, accumulate=2), dataset, store)
    file = run.folder / "not-finite-00000002.pt"
    assert replay(changed(run, accumulate=2), dataset, store, file) == seen[-1]


def test_what_cannot_be_replayed_is_refused(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, tmp_path: Path
) -> None:
    with pytest.raises(ReplayError, match="no file at"):
        replay(run, dataset, store, tmp_path / "nothing.pt")
    (tmp_path / "other.pt").write_bytes(b"something else")
    with pytest.raises(ReplayError, match="holds no step"):
        replay(run, dataset, store, tmp_path / "other.pt")


def test_a_lost_shard_stops_the_run_with_a_checkpoint(
    run: TrainingRun, root: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """With a checkpoint of the last finished step; the run goes on when the shard is back."""
    path = tmp_path / "features.zarr"
    shutil.copytree(root / "features.zarr", path)
    level = path / "sam" / "block_1"

    class Losing(NoProgress):
        steps = 0

        def advance(self, count: int = 1, note: str = "") -> None:
            self.steps += count
            if self.steps == 4:
                for shard in level.rglob("c.*"):
                    shard.write_bytes(b"")

    run = changed(run, checkpoint_every=100)
    with pytest.raises(StoreError, match=r"sam/block_1.* is damaged"):
        train(run, dataset, FeatureStore(path), Losing())
    (finished,) = checkpoints(run)
    assert 4 <= finished < 7
    for shard in level.rglob("c.*"):
        shard.unlink()
    with pytest.raises(StoreError, match=r"sam/block_1.* is missing"):
        train(run, dataset, FeatureStore(path))
    assert checkpoints(run) == [finished]
    shutil.copytree(root / "features.zarr", path, dirs_exist_ok=True)
    assert train(run, dataset, FeatureStore(path)).resumed_at == finished


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_a_message(
    run: TrainingRun,
    dataset: Dataset,
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(_batch: Batch) -> None:
        raise error

    monkeypatch.setattr(Step, "gradient", at_step(2, fail))
    with pytest.raises(OutOfMemoryError, match=r"step 2: .* with 2 images at once\. Double"):
        train(changed(run, accumulate=2), dataset, store)
    assert checkpoints(run) == [2]


def test_other_errors_stay_as_they_are(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_batch: Batch) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Step, "gradient", at_step(0, fail))
    with pytest.raises(RuntimeError, match="a bug"):
        train(run, dataset, store)
    assert checkpoints(run) == []


def test_a_request_to_stop_finishes_the_step(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, whole: bytes
) -> None:
    stop = Stop()

    class Asking(NoProgress):
        steps = 0

        def advance(self, count: int = 1, note: str = "") -> None:
            self.steps += count
            if self.steps == 4:
                stop.request()

    with pytest.raises(Terminated), stop.deferred():
        train(run, dataset, store, Asking(), stop=stop)
    assert checkpoints(run) == [3, 5]
    assert train(run, dataset, store).resumed_at == 5
    assert (run.folder / "student.safetensors").read_bytes() == whole


@pytest.mark.parametrize("damage", ["cut", "one byte", "empty"])
def test_a_damaged_checkpoint_is_passed_over(
    run: TrainingRun,
    dataset: Dataset,
    store: FeatureStore,
    whole: bytes,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    train(run, dataset, store)
    assert checkpoints(run) == [6, 7]
    newest = run.folder / "checkpoint-00000007.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"cut": data[: len(data) // 2], "one byte": data, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert train(run, dataset, store).resumed_at == 6
    (line,) = [record.message for record in caplog.records if "checkpoint" in record.message]
    assert "checkpoint-00000007.pt" in line
    assert "going on from the checkpoint before" in line
    assert (run.folder / "student.safetensors").read_bytes() == whole
    for path in run.folder.glob("checkpoint-*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        train(run, dataset, store)


def test_the_best_checkpoint_is_kept(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = changed(run, checkpoint_every=1, log_every=1, keep_last=2, keep_best="loss_depth")
    train(run, dataset, store)
    with (run.folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = min(rows, key=lambda row: float(row["loss_depth"]))
    assert checkpoints(run) == sorted({6, 7, int(best["step"])})


def test_another_best_is_asked_for_later(
    run: TrainingRun, dataset: Dataset, store: FeatureStore
) -> None:
    """The best of the column asked for before is not taken for the best of the new one."""
    settings = {"checkpoint_every": 1, "log_every": 1, "keep_last": 1}
    short = changed(run, **settings, keep_best="loss_depth")
    stop = Stop()
    with pytest.raises(Terminated), patch.object(Step, "clip", _asking(stop, at=4)):
        train(short, dataset, store, stop=stop)
    again = changed(run, **settings, keep_best="loss")
    train(again, dataset, store)
    with (run.folder / "log.csv").open() as file:
        late = [row for row in csv.DictReader(file) if int(row["step"]) > 4]
    best = min(late, key=lambda row: float(row["loss"]))
    assert checkpoints(again) == sorted({7, int(best["step"])})


def _asking(stop: Stop, at: int) -> Any:
    calls, clip = count(1), Step.clip

    def call(*arguments: Any) -> None:
        if next(calls) == at - 1:  # heard in the next step
            stop.request()
        clip(*arguments)

    return call


def test_a_best_that_is_not_logged_is_refused_before_the_first_step(
    run: TrainingRun, dataset: Dataset, store: FeatureStore
) -> None:
    with pytest.raises(NoSuchColumnError, match=r"'loss_dept'.*did you mean 'loss_depth'"):
        train(changed(run, keep_best="loss_dept"), dataset, store)
    assert not run.folder.exists() or not list(run.folder.iterdir())


def test_dvclive_has_each_step_once_after_a_crash(
    run: TrainingRun, dataset: Dataset, store: FeatureStore
) -> None:
    tracked = replace(run, runtime=CPU.model_copy(update={"trackers": ("dvclive",)}))
    train(tracked, dataset, store)
    tables = sorted((run.folder / "dvclive").rglob("*.tsv"))
    whole = {path.name: path.read_text() for path in tables}
    assert len(whole) > 5
    (run.folder / "checkpoint-00000007.pt").unlink()  # as if it had died after the log's last row
    assert train(tracked, dataset, store).resumed_at == 6
    for name in whole.keys() - {"images_per_second.tsv", "data_wait.tsv"}:
        again = (run.folder / "dvclive" / "plots" / "metrics" / name).read_text()
        assert _numbers(again) == pytest.approx(_numbers(whole[name]), rel=1e-8), name
    with (run.folder / "log.csv").open() as file:
        logged = [int(row["step"]) for row in csv.DictReader(file)]
    rows = list(csv.DictReader(io.StringIO(whole["loss.tsv"]), delimiter="\t"))
    assert [int(row["step"]) for row in rows] == logged


def _numbers(table: str) -> list[float]:
    return [float(cell) for line in table.splitlines()[1:] for cell in line.split("\t")]


def test_tensorboard_reads_what_was_logged(
    run: TrainingRun, dataset: Dataset, store: FeatureStore
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        replace(run, runtime=CPU.model_copy(update={"trackers": ("tensorboard",)})), dataset, store
    )
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    with (run.folder / "log.csv").open() as file:
        logged = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    assert found == pytest.approx(logged, rel=1e-6)


def test_what_is_logged(run: TrainingRun, dataset: Dataset, store: FeatureStore) -> None:
    train(run, dataset, store)
    with (run.folder / "log.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    others = {"step", "learning_rate", "images_per_second", "data_wait", "gradient_norm"}
    tasks = [task.name for task in run.tasks]
    expected = loss_columns(tasks, dict.fromkeys(run.distilled, 2))
    assert [name for name in row if name not in others] == expected
    levels = [float(row[f"distill_sam.{k}"]) for k in range(2)]
    assert sum(levels) == pytest.approx(float(row["distill_sam"]), rel=1e-5)
    assert float(row["gradient_norm"]) > 0
    assert 0 <= float(row["data_wait"]) <= 1
    assert float(row["images_per_second"]) > 0
    assert float(row["learning_rate"]) > 0


def test_trackers_get_the_rows(
    run: TrainingRun, dataset: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, object]] = []

    class Library:
        """Stands for wandb, and for a run of it."""

        def init(self, **options: Any) -> "Library":
            events.append(("init", options["id"]))
            return self

        def log(self, values: dict[str, float], step: int) -> None:
            events.append(("log", step))
            assert values["gradient_norm"] > 0

        def finish(self) -> None:
            events.append(("finish", None))

    monkeypatch.setitem(sys.modules, "wandb", Library())  # type: ignore[arg-type]
    train(replace(run, runtime=CPU.model_copy(update={"trackers": ("wandb",)})), dataset, store)
    steps = [("log", step) for step in (2, 4, 6, 7)]
    assert events == [("init", "run"), *steps, ("finish", None)]


@pytest.mark.parametrize("name", ["dvclive", "tensorboard", "wandb"])
def test_a_tracker_that_is_missing_is_named(
    run: TrainingRun,
    dataset: Dataset,
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrackerError, match=rf"pip install 'sak-distill\[{name}\]'"):
        train(replace(run, runtime=CPU.model_copy(update={"trackers": (name,)})), dataset, store)
