"""The target stream: images, labels and cached teacher features, joined by image id.

Shapes: `B` batch, `H W` image pixels, `h w` a teacher's grid, `C` its channels.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from stages.data.dataset import Dataset
from stages.data.images import read_image
from stages.data.view import DepthRule, View, cut_view, part_of, view_image, whole
from stages.data.views import row_view
from stages.train.config import ReuseConfig
from stages.train.jitter import image_generator, jitter
from stages.train.live import LiveTeacher
from stages.train.reuse import draw_part, part_shares
from stages.train.sampling import Draw, StepSampler, choose_view
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
    """Per teacher, per level: `b h w K` as stored, see `stages.train.targets`. Of a teacher that
    runs live, instead of levels: its one input, `b ...` as it prepares it."""
    target_rows: dict[str, Tensor | None]
    """Per teacher: which images of the batch those are (`b`, int64); None: all of them."""
    parts: Tensor | None = None
    """Where stored grids are reused, the part of its view that an image shows, `B 5` float32:
    mirrored (0 or 1), then top, left, height and width as shares of the view."""

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
            parts=None if self.parts is None else change(self.parts),
        )


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
    reuse: ReuseConfig = field(default_factory=ReuseConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """A view of an image and its labels, decoded and resized."""

    image: Tensor
    labels: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    """Of the teachers that run live."""

    def bytes(self) -> int:
        parts = (self.image, *self.labels.values(), *self.inputs.values())
        return sum(part.nbytes for part in parts)


@dataclass(slots=True, kw_only=True)
class _ViewCache:
    """Keeps the first views it is given, up to a limit; each loading process has its own."""

    limit: int
    used: int = 0
    views: dict[tuple[int, View | None], _Shown] = field(default_factory=dict)
    """By row of the store and part of it."""

    def put(self, row: int, part: View | None, shown: _Shown) -> None:
        if self.used + shown.bytes() <= self.limit:
            self.used += shown.bytes()
            self.views[row, part] = shown


class TargetStream(TorchDataset[Batch]):
    """Makes whole batches out of draws; only asked tasks, teachers and levels are read.

    Of the `live` teachers nothing is read: their inputs are made.
    """

    def __init__(
        self,
        spec: StreamSpec,
        dataset: Dataset,
        store: FeatureStore,
        live: Mapping[str, LiveTeacher] = MappingProxyType({}),
    ) -> None:
        self.spec = spec
        self._dataset, self._store = dataset.with_tasks(spec.tasks), store
        self._prepare = {name: live[name].preprocess for name in spec.teachers if name in live}
        self.levels: dict[str, list[tuple[str, Grid]]] = {
            name: [
                (level.name, _grid(name, level, spec.resolution))
                for level in (live[name].spec if name in live else store.teachers[name]).levels
            ]
            for name in spec.teachers
        }
        self._cache = _ViewCache(limit=spec.cache_bytes)
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
        parts = [
            self._part(draw.epoch, image_id, row)
            for draw, image_id, row in zip(draws, ids, rows, strict=True)
        ]
        shown = [self._shown(*which) for which in zip(ids, rows, parts, strict=True)]
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
            targets=self._targets(rows, shown),
            target_rows=dict.fromkeys(self.spec.teachers),
            parts=self._shares(rows, parts),
        )

    def _targets(self, rows: Sequence[int], shown: Sequence[_Shown]) -> dict[str, list[Tensor]]:
        return {
            name: [torch.stack([one.inputs[name] for one in shown])]
            if name in self._prepare
            else [
                torch.from_numpy(self._store.read_codes(name, level, rows, grid))
                for level, grid in levels
            ]
            for name, levels in self.levels.items()
        }

    def _part(self, epoch: int, image_id: str, row: int) -> View | None:
        if not self.spec.reuse.asked:
            return None
        return draw_part(self.spec.reuse, self._size(row), self.spec.seed, epoch, image_id)

    def _shares(self, rows: Sequence[int], parts: Sequence[View | None]) -> Tensor | None:
        shares = [
            part_shares(part, self._size(row))
            for row, part in zip(rows, parts, strict=True)
            if part is not None
        ]
        return torch.tensor(shares) if shares else None

    def _size(self, row: int) -> tuple[int, int]:
        """Return the pixels of a row's view before any resizing (rows, columns)."""
        _, _, height, width = self._store.views.boxes[row]
        return int(height), int(width)

    def _prepared(self, image: Tensor, epoch: int, image_id: str) -> Tensor:
        pixels = image.float() / 255
        if self.spec.jitter:
            pixels = jitter(pixels, image_generator(self.spec.seed, epoch, image_id))
        return (pixels - self._mean) / self._std

    def _shown(self, image_id: str, row: int, part: View | None) -> _Shown:
        shown = self._cache.views.get((row, part))
        if shown is None:
            shown = self._read(image_id, row, part)
            if self.spec.reuse.crop is None:  # else hardly any part comes twice
                self._cache.put(row, part, shown)
        return shown

    def _read(self, image_id: str, row: int, part: View | None) -> _Shown:
        """Replay a row's view, so that the student sees what the teachers saw, or a part of it."""
        size, views = self.spec.image_size, self._store.views
        path = self._dataset.path(image_id)
        file = read_image(path)
        if file.sha256 != self._store.images.sha256[row // views.views_per_image]:
            raise StreamError(
                f"image '{image_id}' ({path}) is not the one that the store was made from: its "
                "content has changed since `sak index`. Restore the file, or index and extract "
                "into another store"
            )
        view = row_view(views, row)
        pixels = cut_view(file.pixels, view)
        inputs = {name: make(pixels, whole(pixels)) for name, make in self._prepare.items()}
        if part is not None:
            pixels, view = cut_view(pixels, part), part_of(view, part)
        image = np.moveaxis(view_image(pixels, whole(pixels), size), -1, 0)
        asked = self.spec.tasks
        labels = self._dataset.labels(image_id, size, view, self.spec.depth) if asked else {}
        return _Shown(
            image=torch.from_numpy(np.array(image, order="C")),
            labels={task: _label_tensor(labels[task]) for task in self.spec.tasks},
            inputs=inputs,
        )


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


def _label_tensor(label: npt.NDArray[Any]) -> Tensor:
    """Move the channels of an `H W 3` label to the front."""
    channels_first = np.moveaxis(label, -1, 0) if label.ndim == 3 else label
    return torch.from_numpy(np.ascontiguousarray(channels_first))


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
    stream: TargetStream, *, batch_size: int, start: int, stop: int, workers: int, pin: bool
) -> Iterator[Batch]:
    """Iterate over the batches of steps `start` (inclusive) to `stop` (exclusive)."""
    sampler = StepSampler(
        images=len(stream), batch_size=batch_size, seed=stream.spec.seed, start=start, stop=stop
    )
    loader = DataLoader(
        stream,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # else the loader draws from the global one, unlike a resume
    )
    return iter(loader)


def _unchanged(batch: Any) -> Any:
    return batch
