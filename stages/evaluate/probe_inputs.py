"""What a linear probe sees: standardised features, and labels on any grid.

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
from stages.evaluate.features import FeatureSource, Key
from stages.evaluate.metrics import MAX_DEPTH
from store.spec import Grid

ALL_LEVELS = "all"
"""Name of the concatenation of a teacher's levels."""
CLASS_TASKS = ("segmentation", "parts", "saliency")
_SMALLEST_DEVIATION = 1e-6  # a constant channel stays 0 instead of becoming 0 / 0


class ProbeFeatures:
    """Standardised levels of a source, with the constant as last channel.

    Where a teacher has several levels, `all` joins them on their median grid.
    """

    def __init__(self, source: FeatureSource) -> None:
        self._source = source
        self._moments = {
            key: (mean, deviation.clamp(min=_SMALLEST_DEVIATION))
            for key in source.grids
            for mean, deviation in (source.moments(key),)
        }
        self.grids: dict[Key, Grid] = dict(source.grids)
        self.sizes = {key: channels + 1 for key, channels in source.channels.items()}
        self._joined = self._groups()
        for name, keys in self._joined.items():
            grids = sorted((source.grids[key] for key in keys), key=math.prod)
            self.grids[name, ALL_LEVELS] = grids[len(keys) // 2]
            self.sizes[name, ALL_LEVELS] = sum(source.channels[key] for key in keys) + 1

    def read(self, ids: Sequence[str]) -> dict[Key, Float[Tensor, "B _ _ _"]]:
        """Return `B h w F` per level, and for all levels joined when there are several."""
        levels = {}
        for key, values in self._source.read(ids).items():
            mean, deviation = self._moments[key]
            levels[key] = (values - mean) / deviation
        for name, keys in self._joined.items():
            grid = self.grids[name, ALL_LEVELS]
            levels[name, ALL_LEVELS] = torch.cat([resize(levels[k], grid) for k in keys], dim=-1)
        return {key: F.pad(x, (0, 1), value=1.0) for key, x in levels.items()}

    def _groups(self) -> dict[str, list[Key]]:
        groups: dict[str, list[Key]] = {}
        for key in self._source.grids:
            groups.setdefault(key[0], []).append(key)
        return {name: keys for name, keys in groups.items() if len(keys) > 1}


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
