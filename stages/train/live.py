"""What training asks of a teacher that runs while the student trains: `stages.extract` makes them.

Letters: `b` images, `h w` grid, `C` channels.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.data.view import Box
from store.spec import TeacherSpec

Prepare = Callable[[npt.NDArray[np.uint8], Box], Tensor]
"""Makes the input of one image: its part `box` of RGB pixels (rows, columns, 3)."""


@runtime_checkable
class LiveFeatures(Protocol):
    """What a teacher answers."""

    @property
    def levels(self) -> Mapping[str, Tensor]:
        """By name of a level `b h w C` float32, on the teacher's device."""
        ...


@runtime_checkable
class LiveTeacher(Protocol):
    """A teacher of `stages.extract`, as far as training needs it."""

    @property
    def spec(self) -> TeacherSpec:
        """Its levels and provenance."""
        ...

    @property
    def preprocess(self) -> Prepare:
        """What makes an input; goes to the loading processes, so it is best without the weights."""
        ...

    def __call__(self, images: Tensor) -> LiveFeatures:
        """Return the levels of a stack of inputs."""
        ...


LoadTeachers = Callable[[torch.device], Mapping[str, LiveTeacher]]
"""Loads teachers, by name, to the device of the process that trains."""
