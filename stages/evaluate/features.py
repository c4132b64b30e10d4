"""Features that probes look at: of every teacher in a store, or of a student.

Letters: B images, h w a level's grid, C its channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from stages.data.dataset import Dataset
from stages.evaluate.run import load_view, normalise
from stages.train.student import STEM, Student
from store.reader import FeatureStore
from store.spec import GLOBAL, Grid

Key = tuple[str, str]
"""Teacher (of a student: `stem` or the teacher of a path) and level."""
_CALIBRATION_IMAGES = 64


@runtime_checkable
class FeatureSource(Protocol):
    """Gives features of images by their ids."""

    @property
    def grids(self) -> Mapping[Key, Grid]:
        """Rows and columns of each level."""
        ...

    @property
    def channels(self) -> Mapping[Key, int]:
        """Channels of each level."""
        ...

    def moments(self, key: Key) -> tuple[Float[Tensor, "C"], Float[Tensor, "C"]]:
        """Return mean and standard deviation per channel; for a student, of some images only."""
        ...

    def read(self, ids: Sequence[str]) -> dict[Key, Float[Tensor, "B _ _ _"]]:
        """Return `B h w C` float32 per level, on the device."""
        ...

    def pooled(self, ids: Sequence[str]) -> dict[Key, Float[Tensor, "B _"]]:
        """Return a vector per image: each level's mean over its tokens, and `global` if there."""
        ...


class StoreFeatures:
    """The finest stored grid of every level of some finished teachers, of all if not named."""

    def __init__(
        self, store: FeatureStore, device: torch.device, teachers: Sequence[str] | None = None
    ) -> None:
        self._store, self._device = store, device
        names = tuple(store.teachers) if teachers is None else teachers
        self._teachers = {name: store.teachers[name] for name in names}
        levels = {
            (name, level.name): level
            for name, teacher in self._teachers.items()
            for level in teacher.levels
        }
        self.grids = {key: level.stored[0] for key, level in levels.items()}
        self.channels = {key: level.channels for key, level in levels.items()}

    def moments(self, key: Key) -> tuple[Tensor, Tensor]:
        """Return what the store gathered over all its rows."""
        statistics = self._store.statistics(*key)
        mean, deviation = statistics.mean, np.sqrt(statistics.variance)
        return self._tensor(mean.astype(np.float32)), self._tensor(deviation.astype(np.float32))

    def read(self, ids: Sequence[str]) -> dict[Key, Tensor]:
        """Read view 0 of some images."""
        rows = [self._store.row(image_id) for image_id in ids]
        return {key: self._tensor(self._store.read(*key, rows)).float() for key in self.grids}

    def pooled(self, ids: Sequence[str]) -> dict[Key, Tensor]:
        """Average the tokens; teachers that have one add their own vector."""
        rows = [self._store.row(image_id) for image_id in ids]
        vectors = {key: level.mean(dim=(1, 2)) for key, level in self.read(ids).items()}
        for name, teacher in self._teachers.items():
            if teacher.global_channels is not None:
                own = self._store.read(name, GLOBAL, rows)
                vectors[name, GLOBAL] = self._tensor(own).float()
        return vectors

    def _tensor(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


class StudentFeatures:
    """What a student computes at its tapped blocks: its stem, and each path after its norm.

    With `aligned`, paths are in their teachers' widths, as the distillation loss compares them.
    """

    def __init__(
        self, student: Student, dataset: Dataset, image_size: Grid, aligned: bool = False
    ) -> None:
        self._student, self._dataset, self._size = student.eval(), dataset, image_size
        self._aligned = aligned
        grid = student.vit.patch_embed.dynamic_feat_size(image_size)
        self.keys = {
            name: tuple((name, f"block_{block:02}") for block in student.levels)
            for name in (STEM, *student.teachers)
        }
        """Per stem and path, its levels in order."""
        every = [key for keys in self.keys.values() for key in keys]
        self.grids = dict.fromkeys(every, (int(grid[0]), int(grid[1])))
        self._moments: dict[Key, tuple[Tensor, Tensor]] = {}

    @property
    def channels(self) -> Mapping[Key, int]:
        """Channels of each level, known once `calibrate` has seen them."""
        return {key: len(mean) for key, (mean, _) in self._moments.items()}

    def calibrate(self, ids: Sequence[str]) -> None:
        """Take channels, mean and deviation from the first images."""
        for key, level in self.read(ids[:_CALIBRATION_IMAGES]).items():
            tokens = level.flatten(0, 2)
            self._moments[key] = (tokens.mean(dim=0), tokens.std(dim=0, correction=0))

    def moments(self, key: Key) -> tuple[Tensor, Tensor]:
        """Return what `calibrate` found."""
        return self._moments[key]

    def read(self, ids: Sequence[str]) -> dict[Key, Tensor]:
        """Run the student on view 0 of some images.

        Raises:
            ImageError: one cannot be read.
        """
        views = [load_view(self._dataset, image_id, self._size) for image_id in ids]
        with torch.inference_mode():
            pixels = normalise(self._student, views)
            found = self._student.representations(pixels, self._aligned)
        return {
            key: level.float()
            for name, keys in self.keys.items()
            for key, level in zip(keys, found[name], strict=True)
        }

    def pooled(self, ids: Sequence[str]) -> dict[Key, Tensor]:
        """Average the tokens of each level."""
        return {key: level.mean(dim=(1, 2)) for key, level in self.read(ids).items()}
