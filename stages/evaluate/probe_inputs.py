"""What a linear probe sees: standardised features of a store, and labels on any grid.

Letters: B batch, h w a level's grid, F its channels and a constant, K outputs of a task.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from stages.data.dataset import Dataset
from stages.data.tasks import IGNORE, Task
from stages.data.view import Box, view_label
from stages.evaluate.metrics import MAX_DEPTH
from store.reader import FeatureStore

ALL_LEVELS = "all"
"""Name of the concatenation of a teacher's levels."""
CLASS_TASKS = ("segmentation", "parts", "saliency")
_SMALLEST_DEVIATION = 1e-6  # a constant channel stays 0 instead of becoming 0 / 0


class FeatureReader:
    """Reads a teacher's levels, standardised, with the constant as last channel."""

    def __init__(self, store: FeatureStore, teacher: str, device: torch.device) -> None:
        levels = store.teachers[teacher].levels
        self._store, self._teacher, self._device = store, teacher, device
        self._joined = len(levels) > 1
        self._moments = {}
        for level in levels:
            statistics = store.statistics(teacher, level.name)
            deviation = np.sqrt(statistics.variance).clip(min=_SMALLEST_DEVIATION)
            self._moments[level.name] = tuple(
                torch.from_numpy(v.astype(np.float32)).to(device)
                for v in (statistics.mean, deviation)
            )
        self.grids = {level.name: level.stored[0] for level in levels}
        self.sizes = {level.name: level.channels + 1 for level in levels}
        if self._joined:
            self.grids[ALL_LEVELS] = sorted(self.grids.values(), key=math.prod)[len(levels) // 2]
            self.sizes[ALL_LEVELS] = sum(level.channels for level in levels) + 1

    def read(self, ids: Sequence[str]) -> dict[str, Float[Tensor, "B _ _ _"]]:
        """Return `B h w F` per level, and for all levels joined when there are several."""
        rows = [self._store.row(image_id) for image_id in ids]
        levels = {}
        for name, (mean, deviation) in self._moments.items():
            stored = torch.from_numpy(self._store.read(self._teacher, name, rows))
            levels[name] = (stored.to(self._device).float() - mean) / deviation
        if self._joined:
            grid = self.grids[ALL_LEVELS]
            levels[ALL_LEVELS] = torch.cat([resize(x, grid) for x in levels.values()], dim=-1)
        return {name: F.pad(x, (0, 1), value=1.0) for name, x in levels.items()}


class LabelReader:
    """The labels of some images, on whatever grid they are asked for."""

    def __init__(self, dataset: Dataset, ids: Sequence[str], image_size: tuple[int, int]) -> None:
        self._labels = [dataset.labels(image_id, image_size) for image_id in ids]
        height, width = image_size
        self._box = Box(top=0, left=0, height=height, width=width)
        self._known: dict[tuple[str, tuple[int, int]], Tensor] = {}

    def on(self, task: str, grid: tuple[int, int]) -> Tensor:
        """Return `B h w` (normals `B h w 3`): the nearest pixel's label; boundary where any is."""
        if (task, grid) not in self._known:
            views = [view_label(task, labels[task], self._box, grid) for labels in self._labels]
            self._known[task, grid] = torch.from_numpy(np.stack(views))
        return self._known[task, grid]


def targets(task: Task, label: Tensor) -> tuple[Float[Tensor, "B h w K"], Bool[Tensor, "B h w"]]:
    """Return what a regression is fitted to, and where: labels of a task on a grid."""
    if task.name in CLASS_TASKS:
        valid = label != IGNORE
        return F.one_hot(label.where(valid, 0), task.channels).float(), valid
    if task.name == "normals":
        return label, (label != 0).any(-1)
    if task.name == "depth":
        return label[..., None], (label > 0) & (label < MAX_DEPTH)
    return label[..., None], label != IGNORE


def resize(x: Float[Tensor, "B h w F"], grid: tuple[int, int]) -> Float[Tensor, "B H W F"]:
    """Resample bilinearly, averaging where the grid gets coarser."""
    if x.shape[1:3] == grid:
        return x
    resized = F.interpolate(x.movedim(-1, 1), size=grid, mode="bilinear", antialias=True)
    return resized.movedim(1, -1)
