"""The batch size at which a teacher is fastest on this machine, for `batch_size: auto`."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from stages.extract.teachers import Features
from stages.memory import is_out_of_memory

LARGEST = 256
_GAIN = 1.05
"""How much faster per image twice the batch must be, to be worth its memory."""
_RUNS = 2


def find_batch_size(teacher: Callable[[Tensor], Features], image: Tensor) -> int:
    """Return the batch size to use: doubled while that makes images clearly faster and fits.

    `image` is one preprocessed input. The size depends on what else the machine does; features of
    another size may differ in the last bits.
    """
    best, best_rate = 1, 0.0
    size = 1
    while size <= LARGEST:
        rate = _images_per_second(teacher, image, size)
        if rate is None or rate < _GAIN * best_rate:
            break
        best, best_rate = size, rate
        size *= 2
    return best


def _images_per_second(
    teacher: Callable[[Tensor], Features], image: Tensor, size: int
) -> float | None:
    """Return the best of a few runs after a first one, None where memory runs out."""
    batch = torch.stack([image] * size)
    try:
        teacher(batch)
        return size / min(_seconds(teacher, batch) for _ in range(_RUNS))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _seconds(teacher: Callable[[Tensor], Features], batch: Tensor) -> float:
    started = time.perf_counter()
    features = teacher(batch)
    for values in features.outputs().values():
        values[0, 0].sum().item()  # a GPU answers before it is done
    return time.perf_counter() - started
