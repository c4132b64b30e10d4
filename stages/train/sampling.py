"""Which images and views a step sees: a pure function of seed and step, so any can be resumed."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler


class BatchSizeError(ValueError):
    """A batch cannot be filled from the images there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One image of one epoch; the epoch enters the image's own random numbers."""

    epoch: int
    index: int


class StepSampler(Sampler[list[Draw]]):
    """Yields the batches of steps `start` (inclusive) to `stop` (exclusive).

    Every epoch is a fresh permutation cut into whole batches; the images left over at its end
    are not seen in that epoch, so no batch is short and no image comes twice in one epoch.

    Raises:
        BatchSizeError: fewer images than a batch needs.
    """

    def __init__(self, *, images: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        if batch_size > images:
            raise BatchSizeError(
                f"batch_size {batch_size} is larger than the {images} images to train on; "
                f"set it to at most {images}"
            )
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._steps = range(start, stop)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield one list of draws per step."""
        per_epoch = self._images // self._batch_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in self._steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self._order(epoch)
            first = step % per_epoch * self._batch_size
            chosen = order[first : first + self._batch_size]
            yield [Draw(epoch=epoch, index=int(index)) for index in chosen]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._steps)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        bits = np.random.Philox(key=[self._seed, epoch])
        return np.random.Generator(bits).permutation(self._images)


class RankSampler(Sampler[list[Draw]]):
    """Yields process `rank`'s part of every step; the `world` parts together are the step."""

    def __init__(self, steps: StepSampler, rank: int, world: int) -> None:
        self._steps, self._rank, self._world = steps, rank, world

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield one list of draws per step."""
        for draws in self._steps:
            share = len(draws) // self._world
            yield draws[self._rank * share : (self._rank + 1) * share]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._steps)


def choose_view(seed: int, epoch: int, image_id: str, views: int) -> int:
    """Return which of its views an image shows in an epoch, whoever asks and in whatever order.

    In every `views` epochs, counted from the first, an image shows each of them once, in an order
    of its own.
    """
    if views == 1:
        return 0
    cycle, place = divmod(epoch, views)
    text = f"views/{seed}/{cycle}/{image_id}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little"))
    return int(np.random.Generator(bits).permutation(views)[place])
