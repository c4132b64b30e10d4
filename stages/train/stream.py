"""The target stream: images, labels and cached teacher features, joined by image id.

Shapes: `B` batch, `H W` image pixels, `h w` a teacher's grid, `C` its channels.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from stages.data.dataset import Dataset
from stages.data.view import DepthRule
from stages.train.jitter import image_generator, jitter
from stages.train.prefetch import load, load_by_processes
from stages.train.sampling import (
    Draw,
    Shuffle,
    StepSampler,
    ask_teachers,
    check_teachers_per_image,
    choose_view,
)
from stages.train.shown import ShownViews
from store.reader import FeatureStore
from store.spec import Grid, LevelSpec

MEGABYTE = 1 << 20

logger = logging.getLogger(__name__)


class StreamError(ValueError):
    """There is nothing to train on, or the data cannot serve what is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step needs."""

    ids: tuple[str, ...]
    views: tuple[int, ...]
    """Which view of each image."""
    images: Tensor
    """`B 3 H W` float32, jittered and normalised."""
    labels: dict[str, Tensor]
    """Per task `B H W` (normals `B 3 H W`), in the dtype of the data set."""
    targets: dict[str, list[Tensor]]
    """Per teacher, per level: `b h w K` as stored, see `stages.train.targets`."""
    target_rows: dict[str, Tensor | None]
    """Per teacher: which images of the batch those are (`b`, int64); None: all of them."""

    def to(self, device: torch.device) -> "Batch":
        """Copy everything to a device; the copy overlaps with computing where it can."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Move everything to page-locked memory; the data loader calls this by name."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            ids=self.ids,
            views=self.views,
            images=change(self.images),
            labels={name: change(label) for name, label in self.labels.items()},
            targets={
                name: [change(level) for level in levels] for name, levels in self.targets.items()
            },
            target_rows={
                name: rows if rows is None else change(rows)
                for name, rows in self.target_rows.items()
            },
        )

    def used_by(self, stream: Any) -> None:
        """Tell the allocator that a CUDA stream uses these tensors, see `Tensor.record_stream`."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(record)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """What to read and how to prepare it."""

    ids: tuple[str, ...]
    teachers: tuple[str, ...]
    tasks: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    jitter: bool
    seed: int
    cache_bytes: int
    resolution: Literal["finest"] | Grid = "finest"
    depth: DepthRule = "metric"
    window: int = 64
    """Shards that are shuffled together, see `Shuffle`."""
    teachers_per_image: int | None = None
    """Teachers drawn for each image and epoch; None: all of them."""


class TargetStream(TorchDataset[Batch]):
    """Makes whole batches out of draws; only asked tasks, teachers and levels are read."""

    def __init__(self, spec: StreamSpec, dataset: Dataset, store: FeatureStore) -> None:
        check_teachers_per_image(spec.teachers_per_image, spec.teachers)
        self.spec, self._pin = spec, False
        self._store = store
        self.levels: dict[str, list[tuple[str, Grid]]] = {
            name: [
                (level.name, _grid(name, level, spec.resolution))
                for level in store.teachers[name].levels
            ]
            for name in spec.teachers
        }
        self._shown = ShownViews(
            dataset=dataset.with_tasks(spec.tasks),
            store=store,
            size=spec.image_size,
            tasks=spec.tasks,
            depth=spec.depth,
            limit=spec.cache_bytes,
        )
        self._mean = torch.tensor(spec.mean).view(3, 1, 1)
        self._std = torch.tensor(spec.std).view(3, 1, 1)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.spec.ids)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """Return the batch of these draws; the data loader calls this by name."""
        ids = tuple(self.spec.ids[draw.index] for draw in draws)
        count = self._store.views.views_per_image
        views = tuple(
            choose_view(self.spec.seed, draw.epoch, image_id, count)
            for draw, image_id in zip(draws, ids, strict=True)
        )
        rows = [self._store.row(*pair) for pair in zip(ids, views, strict=True)]
        asked = ask_teachers(
            self.spec.seed, draws, ids, self.spec.teachers, self.spec.teachers_per_image
        )
        shown = [self._shown.get(image_id, row) for image_id, row in zip(ids, rows, strict=True)]
        images = [
            self._prepared(one.image, draw.epoch, image_id)
            for one, draw, image_id in zip(shown, draws, ids, strict=True)
        ]
        return Batch(
            ids=ids,
            views=views,
            images=torch.stack(images),
            labels={
                task: torch.stack([one.labels[task] for one in shown]) for task in self.spec.tasks
            },
            targets=self._targets(rows, asked),
            target_rows={
                name: None if places is None else torch.tensor(places, dtype=torch.int64)
                for name, places in asked.items()
            },
        )

    def pinned(self) -> "TargetStream":
        """Return this stream, sharing all it keeps, with targets read into page-locked memory."""
        other = copy(self)
        other._pin = True
        return other

    def shuffle(self) -> Shuffle:
        """Return the order of the images, which follows the shards of the targets that are read."""
        views = self._store.views.views_per_image
        arrays = [
            self._store.array(name, *level)
            for name, levels in self.levels.items()
            for level in levels
        ]
        rows = max((array.chunk[0] for array in arrays), default=self._store.rows)
        shards = [self._store.row(image_id) // max(rows, views) for image_id in self.spec.ids]
        numbers = np.unique(shards, return_inverse=True)[1]
        return Shuffle(shards=numbers, window=self.spec.window, seed=self.spec.seed)

    def _targets(
        self, rows: Sequence[int], asked: Mapping[str, list[int] | None]
    ) -> dict[str, list[Tensor]]:
        return {
            name: [self._codes(name, *level, _chosen(rows, asked[name])) for level in levels]
            for name, levels in self.levels.items()
        }

    def _codes(self, teacher: str, level: str, grid: Grid, rows: Sequence[int]) -> Tensor:
        """Read rows of a level once, from the file into the memory that travels."""
        layout = self._store.array(teacher, level, grid)
        dtype = torch.from_numpy(np.empty(0, layout.dtype)).dtype
        codes = torch.empty((len(rows), *layout.shape[1:]), dtype=dtype, pin_memory=self._pin)
        self._store.read_codes_into(teacher, level, rows, codes.numpy(), grid)
        return codes

    def _prepared(self, image: Tensor, epoch: int, image_id: str) -> Tensor:
        pixels = image.float() / 255
        if self.spec.jitter:
            pixels = jitter(pixels, image_generator(self.spec.seed, epoch, image_id))
        return (pixels - self._mean) / self._std


def _chosen(rows: Sequence[int], places: Sequence[int] | None) -> Sequence[int]:
    return rows if places is None else [rows[place] for place in places]


def _grid(teacher: str, level: LevelSpec, resolution: Literal["finest"] | Grid) -> Grid:
    if resolution == "finest":
        return level.stored[0]
    for grid in level.stored:
        if grid[0] <= resolution[0] and grid[1] <= resolution[1]:
            return grid
    stored = ", ".join(f"{height} x {width}" for height, width in level.stored)
    raise StreamError(
        f"teacher {teacher!r}, level {level.name!r} is stored at {stored}, nothing as small as "
        f"resolution: {list(resolution)}; choose a stored one, or add it to the teacher's "
        "`resolutions` and extract again"
    )


def usable_ids(
    dataset: Dataset, split: str, store: FeatureStore, teachers: Sequence[str]
) -> tuple[str, ...]:
    """Return the images of a split that are readable, every view with features of every teacher.

    Raises:
        StreamError: no image is left.
        SourceError: the data has no such split.
    """
    listed = dataset.split(split)
    valid = np.array([status == "ok" for status in store.images.statuses])
    views = store.views.views_per_image
    for name in teachers:
        valid &= store.valid(name).reshape(-1, views).all(axis=1)
    ids = tuple(image_id for image_id in listed if valid[store.row(image_id) // views])
    if left_out := len(listed) - len(ids):
        logger.warning("%d of %d images of %r are not usable", left_out, len(listed), split)
    if not ids:
        raise StreamError(
            f"none of the {len(listed)} images of split {split!r} is usable; "
            "`sak inspect` shows why they were quarantined"
        )
    return ids


def batches(
    stream: TargetStream,
    *,
    batch_size: int,
    start: int,
    stop: int,
    workers: int,
    pin: bool,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Iterate over a rank's batches of steps `start` (inclusive) to `stop` (exclusive).

    `batch_size` counts the images of all ranks together, see `StepSampler`.

    Raises:
        BatchSizeError: fewer images than a batch, or no whole number of images per rank.
    """
    sampler = StepSampler(
        stream.shuffle(), batch_size=batch_size, start=start, stop=stop, rank=rank, world=world
    )
    if workers:  # these cannot lock pages for another process: a thread of the loader copies
        return load_by_processes(stream, sampler, workers, pin)
    return load(stream.pinned() if pin else stream, sampler, pin)
