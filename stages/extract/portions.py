"""Fewer images at a time where a batch does not fit into memory."""

import logging

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from stages.data.view import Box
from stages.extract.devices import device_of
from stages.extract.errors import BatchTooLargeError
from stages.extract.teachers import Features, Teacher
from store.spec import TeacherSpec

_MESSAGES = ("can't allocate memory", "out of memory")
_logger = logging.getLogger(__name__)


class Portions:
    """A teacher that answers a batch in smaller portions once memory ran out.

    Rows of smaller portions are the same within the tolerance of the teacher's arithmetic.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._most: int | None = None
        self._reason = ""

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

    def preprocess(self, image: UInt8[np.ndarray, "rows columns 3"], box: Box) -> Tensor:
        """Return the teacher's input for the part `box` of an RGB image."""
        return self._teacher.preprocess(image, box)

    def __call__(self, images: Shaped[Tensor, "B ..."]) -> Features:
        """Return the levels of a batch of preprocessed images.

        Raises:
            BatchTooLargeError: not even one image fits.
        """
        parts: list[Features] = []
        start = 0
        while start < len(images):
            portion = images[start : start + (self._most or len(images))]
            features = self._attempt(portion)
            if features is None:  # only here, where the failed call holds no memory any more
                self._halve(len(portion))
            else:
                parts.append(features)
                start += len(portion)
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _attempt(self, images: Tensor) -> Features | None:
        try:
            return self._teacher(images)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._reason = " ".join(str(error).split())[:200] or type(error).__name__
        return None

    def _halve(self, tried: int) -> None:
        name = self._teacher.spec.name
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if tried == 1:
            raise BatchTooLargeError(
                f"teacher {name!r} runs out of memory with a single image ({self._reason}); choose a "
                "smaller `input_size:` or `precision: bf16`, another device, or free its memory"
            )
        self._most = tried // 2
        _logger.warning(
            "teacher %r: out of memory with %d images at once, going on with %d; "
            "set `extract: {batch_size: %d}` to begin with that",
            name, tried, self._most, self._most,
        )  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of torch or Python says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def _joined(parts: list[Features]) -> Features:
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Features(
        levels={name: torch.cat([part.levels[name] for part in parts]) for name in parts[0].levels},
        pooled=torch.cat(pooled) if pooled else None,
    )
