"""A data set, a store and a student small enough to train in a second, for tests.

As a program, `python -m stages.train.testing '{"root": ...}'` does what an `Order` says: that is
what tests start with torchrun, or kill.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from stages.data.config import NyudData
from stages.data.dataset import Dataset, open_dataset
from stages.data.images import read_image
from stages.stopping import Stop, Terminated
from stages.train import files
from stages.train.config import PhaseConfig, RuntimeConfig, StudentConfig
from stages.train.distributed import joined_ranks
from stages.train.identity import TrainingRun
from stages.train.record import Record
from stages.train.run import train
from stages.train.step import Step
from stages.train.stream import Batch
from store.images import ImageTable, ViewTable
from store.reader import FeatureStore
from store.spec import LevelSpec, TeacherSpec
from store.writer import FeatureWriter, create_store

SIZE = (24, 32)
TEACHERS = {"dino": ((3, 4), (6, 8)), "sam": ((5, 7), (4, 4))}


def make_data(root: Path, images: int = 12) -> Dataset:
    """NYUD's layout with random content, 40 x 50 pixels, two images for validation."""
    random = np.random.default_rng(0)
    ids = [f"{index:04d}" for index in range(images)]
    folders = ("images", "segmentation", "edge", "normals", "depth", "gt_sets")
    for folder in folders:
        (root / folder).mkdir(parents=True)
    for name in ids:
        for folder in ("images", "normals"):
            pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{name}.png")
        classes = random.integers(0, 41, (40, 50), dtype=np.uint8)
        Image.fromarray(classes).save(root / "segmentation" / f"{name}.png")
        edges = random.choice([0, 255], (40, 50)).astype(np.uint8)
        Image.fromarray(edges).save(root / "edge" / f"{name}.png")
        depth = random.uniform(1, 5, (40, 50)).astype(np.float32)
        np.save(root / "depth" / f"{name}.npy", depth)
    (root / "gt_sets" / "train.txt").write_text("\n".join(ids[:-2]))
    (root / "gt_sets" / "val.txt").write_text("\n".join(ids[-2:]))
    return open_dataset(NyudData(kind="nyud", root=root))


def make_store(path: Path, dataset: Dataset, quarantined: str = "0001") -> FeatureStore:
    """Random features; rows in reverse order of the data set, one image never valid."""
    ids = tuple(image.id for image in reversed(dataset.images))
    count = len(ids)
    boxes = np.tile(np.array([[1, 0, 38, 50]], np.float32), (count, 1))
    table = ImageTable(
        ids=ids,
        sha256=tuple(read_image(dataset.path(name)).sha256 for name in ids),
        heights=(40,) * count,
        widths=(50,) * count,
        statuses=tuple("broken" if name == quarantined else "ok" for name in ids),
    )
    views = ViewTable(
        image_size=SIZE, boxes=boxes, flips=np.zeros(count, bool), seeds=np.zeros(count, np.uint64)
    )
    create_store(path, table, views)
    random = np.random.default_rng(1)
    for name, grids in TEACHERS.items():
        levels = tuple(
            LevelSpec(name=f"block_{k}", grid=grid, channels=16 * (k + 1))
            for k, grid in enumerate(grids)
        )
        spec = TeacherSpec(name=name, levels=levels, provenance={"seed": 1})
        with FeatureWriter.open(path, spec) as writer:
            for rows in writer.missing():
                features = {
                    level.name: random.normal(size=(len(rows), *level.grid, level.channels))
                    for level in levels
                }
                valid = np.array([table.statuses[row] == "ok" for row in rows])
                writer.write(rows, features, None, valid)
            writer.finish()
    return FeatureStore(path)


ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
STUDENT = StudentConfig(model="vit_tiny_patch16_224", model_args=ARGS, levels=2)
PHASE = PhaseConfig(
    steps=7,
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=2,
    gradient_clip=10.0,
    log_every=2,
    checkpoint_every=3,
)
CPU = RuntimeConfig(device="cpu", seed=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a process shall train, and where it shall die."""

    root: Path
    """Holds `data` and `features.zarr`, see `make_root`."""
    folder: Path
    tasks: bool = False
    phase: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from `PHASE`."""
    runtime: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from `CPU`."""
    kill: tuple[str, int] | None = None
    """SIGKILL to itself the n-th time that it comes to a place of `PLACES`."""
    stop_after: int | None = None
    """Ask for the end in the n-th step of this process, as SIGTERM does."""
    seen: Path | None = None
    """File that receives, per step, a line of JSON: step, rank, ids."""


PLACES: dict[str, tuple[Any, str]] = {
    "gradient known": (Step, "clip"),
    "weights changed": (Record, "add"),
    "file not yet on disk": (os, "fsync"),
    "file in place": (files, "sync_folder"),
}
"""Where a process may be killed: before the call of this function of this owner."""


def make_root(root: Path, images: int = 12) -> Path:
    """Make data of `images` images, two of them for validation and one unusable, and its store."""
    make_store(root / "features.zarr", make_data(root / "data", images))
    return root


def obey(order: Order) -> None:
    """Train as ordered, as one of torchrun's processes where there are several."""
    torch.set_num_threads(1)
    dataset = open_dataset(NyudData(kind="nyud", root=order.root / "data"))
    run = TrainingRun(
        folder=order.folder,
        image_size=SIZE,
        student=STUDENT,
        teachers=tuple(TEACHERS),
        tasks=dataset.tasks if order.tasks else (),
        phase=PHASE.model_copy(update=dict(order.phase)),
        runtime=CPU.model_copy(update=dict(order.runtime)),
    )
    run.folder.mkdir(parents=True, exist_ok=True)
    stop = Stop()
    with joined_ranks("cpu") as ranks, _watched(order, ranks.rank, stop), suppress(Terminated):
        store = FeatureStore(order.root / "features.zarr")
        with stop.deferred():
            train(run, dataset, store, ranks=ranks, stop=stop)


def as_rank(order: Order, environment: Mapping[str, str]) -> None:
    """Train as ordered, in a process whose environment is that of one of torchrun's."""
    os.environ.update(environment)
    obey(order)


@contextmanager
def _watched(order: Order, rank: int, stop: Stop) -> Iterator[None]:
    """Note what each step sees, and kill the process where the order says."""
    with ExitStack() as stack:
        if order.kill is not None:
            place, visit = order.kill
            owner, name = PLACES[place]
            deadly = _at(getattr(owner, name), visit, _die)
            stack.enter_context(patch.object(owner, name, deadly))
        if order.seen is not None:
            noting = _noting(Step.gradient, order.seen, rank)
            stack.enter_context(patch.object(Step, "gradient", noting))
        if order.stop_after is not None and rank == 0:  # the others hear of it
            asking = _at(Step.clip, order.stop_after - 1, stop.request)
            stack.enter_context(patch.object(Step, "clip", asking))
        yield


def _at(function: Callable[..., Any], visit: int, action: Callable[[], None]) -> Callable[..., Any]:
    """Return `function` with an action before its n-th call."""
    calls = count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == visit:
            action()
        return function(*arguments, **options)

    return call


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _noting(gradient: Callable[..., Any], path: Path, rank: int) -> Callable[..., Any]:
    def call(step: Step, batch: Batch, number: int, *rest: Any) -> Any:
        line = json.dumps({"step": number, "rank": rank, "ids": batch.ids})
        with path.open("a") as file:  # one short write in append mode: processes do not mix lines
            file.write(line + "\n")
        return gradient(step, batch, number, *rest)

    return call


def as_json(order: Order) -> str:
    """Write an order as this program's argument."""
    return json.dumps(asdict(order), default=str)


def from_json(text: str) -> Order:
    """Read what `as_json` wrote."""
    values = json.loads(text)
    for name in ("root", "folder", "seen"):
        values[name] = None if values[name] is None else Path(values[name])
    values["kill"] = None if values["kill"] is None else tuple(values["kill"])
    return Order(**values)


if __name__ == "__main__":
    obey(from_json(sys.argv[1]))
