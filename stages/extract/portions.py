"""Fewer images at a time where a batch does not fit into memory."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from stages.data.view import Box
from stages.extract.devices import device_of
from stages.extract.halving import Halving
from stages.extract.preprocess import Preprocessing
from stages.extract.teachers import Features, NetworkTeacher, Teacher
from store.spec import TeacherSpec


class Portions:
    """A teacher that answers a batch in smaller portions once memory ran out.

    Rows of smaller portions are the same within the tolerance of the teacher's arithmetic.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._halving = Halving(f"teacher {teacher.spec.name!r}")

    @property
    def spec(self) -> TeacherSpec:
        """What the teacher gives."""
        return self._teacher.spec

    @property
    def reentrant(self) -> bool:
        """Whether threads may ask it at the same time."""
        return bool(getattr(self._teacher, "reentrant", False))

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return device_of(self._teacher)

    @property
    def input_kind(self) -> Hashable:
        """What its inputs depend on beside the image: teachers with the same can share them."""
        prepare = self._teacher.preprocess
        return prepare.kind if isinstance(prepare, Preprocessing) else self.spec.name

    def preprocess(self, image: UInt8[np.ndarray, "rows columns 3"], box: Box) -> Tensor:
        """Return the teacher's input for the part `box` of an RGB image."""
        return self._teacher.preprocess(image, box)

    def __call__(self, images: Shaped[Tensor, "B ..."]) -> Features:
        """Return the levels of a batch of preprocessed images.

        Raises:
            BatchTooLargeError: not even one image fits.
        """
        return joined(self._halving(len(images), lambda part: self._teacher(images[part])))

    def exact(self) -> "Portions":
        """Return the same teacher in float32.

        Raises:
            TypeError: it computes in one precision only, as teachers of others' making may.
        """
        if not isinstance(self._teacher, NetworkTeacher):
            raise TypeError(f"teacher {self.spec.name!r} has no exact sibling")
        return Portions(self._teacher.exact())


def joined(parts: Sequence[Features]) -> Features:
    """Return the features of consecutive portions as those of one batch."""
    if len(parts) == 1:
        return parts[0]
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Features(
        levels={name: torch.cat([part.levels[name] for part in parts]) for name in parts[0].levels},
        pooled=torch.cat(pooled) if pooled else None,
    )
