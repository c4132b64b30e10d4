"""Views of images with their labels, replayed as the teachers saw them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.data.dataset import Dataset
from stages.data.images import read_image
from stages.data.view import DepthRule, View, cut_view, part_of, view_image, whole
from stages.data.views import row_view
from stages.train.live import Prepare
from store.reader import FeatureStore


class ChangedImageError(ValueError):
    """An image is not the one that the store was made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A view of an image and its labels, decoded and resized; `H W` are the pixels of the view."""

    image: Tensor
    """`3 H W` uint8."""
    labels: Mapping[str, Tensor]
    """Per task `H W`, normals `3 H W`, in the dtype of the data set."""
    inputs: Mapping[str, Tensor]
    """Of each teacher that runs live, the input that it makes of the view."""

    def bytes(self) -> int:
        """Return how much memory it takes."""
        parts = (self.image, *self.labels.values(), *self.inputs.values())
        return sum(part.nbytes for part in parts)


@dataclass(slots=True, kw_only=True)
class ShownViews:
    """Reads views and keeps the first ones, up to a limit; each loading process has its own."""

    dataset: Dataset
    """Of the tasks that are asked for."""
    store: FeatureStore
    size: tuple[int, int]
    tasks: tuple[str, ...]
    depth: DepthRule
    limit: int
    """Bytes that may be kept."""
    prepare: Mapping[str, Prepare]
    """What makes the inputs of the teachers that run live."""
    _used: int = 0
    _kept: dict[tuple[int, View | None], Shown] = field(default_factory=dict)

    def get(self, image_id: str, row: int, part: View | None = None) -> Shown:
        """Return the view of a row of the store, which is one of the image, or a part of the view.

        Raises:
            ChangedImageError: the image is not the one that the store was made from.
            ImageError, LabelError: it cannot be read any more.
        """
        shown = self._kept.get((row, part))
        if shown is None:
            shown = self._read(image_id, row, part)
            if self._used + shown.bytes() <= self.limit:
                self._used += shown.bytes()
                self._kept[row, part] = shown
        return shown

    def _read(self, image_id: str, row: int, part: View | None) -> Shown:
        """Replay a row's view, so that the student sees what the teachers saw."""
        views = self.store.views
        path = self.dataset.path(image_id)
        file = read_image(path)
        if file.sha256 != self.store.images.sha256[row // views.views_per_image]:
            raise ChangedImageError(
                f"image '{image_id}' ({path}) is not the one that the store was made from: its "
                "content has changed since `sak index`. Restore the file, or index and extract "
                "into another store"
            )
        view = row_view(views, row)
        pixels = cut_view(file.pixels, view)
        inputs = {name: make(pixels, whole(pixels)) for name, make in self.prepare.items()}
        if part is not None:
            pixels, view = cut_view(pixels, part), part_of(view, part)
        image = np.moveaxis(view_image(pixels, whole(pixels), self.size), -1, 0)
        asked = self.tasks
        labels = self.dataset.labels(image_id, self.size, view, self.depth) if asked else {}
        return Shown(
            image=torch.from_numpy(np.array(image, order="C")),
            labels={task: _label_tensor(labels[task]) for task in asked},
            inputs=inputs,
        )


def _label_tensor(label: NDArray[Any]) -> Tensor:
    """Move the channels of an `H W 3` label to the front."""
    channels_first = np.moveaxis(label, -1, 0) if label.ndim == 3 else label
    return torch.from_numpy(np.ascontiguousarray(channels_first))
