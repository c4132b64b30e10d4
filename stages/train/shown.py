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
from stages.data.view import DepthRule, cut_view, view_image, whole
from stages.data.views import row_view
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

    def bytes(self) -> int:
        """Return how much memory it takes."""
        return self.image.nbytes + sum(label.nbytes for label in self.labels.values())


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
    _used: int = 0
    _kept: dict[int, Shown] = field(default_factory=dict)

    def get(self, image_id: str, row: int) -> Shown:
        """Return the view of a row of the store, which is one of the image.

        Raises:
            ChangedImageError: the image is not the one that the store was made from.
            ImageError, LabelError: it cannot be read any more.
        """
        shown = self._kept.get(row)
        if shown is None:
            shown = self._read(image_id, row)
            if self._used + shown.bytes() <= self.limit:
                self._used += shown.bytes()
                self._kept[row] = shown
        return shown

    def _read(self, image_id: str, row: int) -> Shown:
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
        image = np.moveaxis(view_image(pixels, whole(pixels), self.size), -1, 0)
        asked = self.tasks
        labels = self.dataset.labels(image_id, self.size, view, self.depth) if asked else {}
        return Shown(
            image=torch.from_numpy(np.array(image, order="C")),
            labels={task: _label_tensor(labels[task]) for task in asked},
        )


def _label_tensor(label: NDArray[Any]) -> Tensor:
    """Move the channels of an `H W 3` label to the front."""
    channels_first = np.moveaxis(label, -1, 0) if label.ndim == 3 else label
    return torch.from_numpy(np.ascontiguousarray(channels_first))
