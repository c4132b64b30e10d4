"""Which images, views and teachers a step sees: pure functions of seed and step.

All that has to be kept of the position in the stream is the number of the step; whoever knows it,
on any machine and with any number of processes, knows every batch that follows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


class BatchSizeError(ValueError):
    """A batch cannot be filled from the images there are, or not be shared out evenly."""


class TeachersPerImageError(ValueError):
    """More teachers are asked for an image than there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One image of one epoch; the epoch enters the image's own random numbers."""

    epoch: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shuffle:
    """A fresh order of the images for every epoch, random yet kind to disks.

    The shards come in random order and are cut into windows of `window` shards; within a window
    the images are in uniformly random order. So at any time only `window` shards are being read
    (for each array), and each is read once per epoch. The smaller the window, the less memory
    holds what a disk or an object store was read ahead, and the more alike are the images of a
    batch where neighbours in the store are alike. A window of all shards is a plain permutation.
    Where the store is sorted by class (100,000 images, 1,000 classes, 303 images a shard), a batch
    of 256 meets 0.26, 0.65 and 0.91 of the classes that a plain permutation shows it with windows
    of 16, 64 and 256, and reads from 16, 62 and 142 shards (`tests/benchmarks/shuffling.py`).
    """

    shards: NDArray[np.int64]
    """The number of the shard (from 0, without gaps) that holds an image, (images,)."""
    window: int
    seed: int

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.shards)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices of the images (images,) in the order of an epoch."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = random.permutation(self.images)
        windows = random.permutation(int(self.shards.max()) + 1) // self.window
        turns = windows.astype(np.min_scalar_type(int(windows.max())))[self.shards[order]]
        return order[np.argsort(turns, kind="stable")]


def one_shard(images: int) -> NDArray[np.int64]:
    """Return the `shards` of a plain permutation of so many images."""
    return np.zeros(images, np.int64)


class StepSampler(Sampler[list[Draw]]):
    """Yields the batches of steps `start` (inclusive) to `stop` (exclusive), as one rank sees them.

    The orders of epochs 0, 1, 2, ... are laid end to end. Step s takes the `batch_size` images
    from s * `batch_size` on, and rank r the r-th of `world` equal parts of these. So every image is
    seen exactly once per epoch, whatever the batch size; the batch in which an epoch ends goes on
    with the next epoch's images (of which one may stand in the batch already); and a step sees the
    same images with any number of ranks or loading processes. Steps of n batches of
    `batch_size` / n, with n times the step numbers, see them too (gradient accumulation).

    Raises:
        BatchSizeError: fewer images than a batch needs, or no whole number of images per rank.
    """

    def __init__(
        self,
        shuffle: Shuffle,
        *,
        batch_size: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size > shuffle.images:
            raise BatchSizeError(
                f"batch_size {batch_size} is larger than the {shuffle.images} images to train on; "
                f"set it to at most {shuffle.images}"
            )
        if batch_size % world:
            raise BatchSizeError(
                f"batch_size {batch_size} counts the images of all {world} processes and cannot be "
                f"shared evenly among them; set it to a multiple of {world}"
            )
        self._shuffle, self._batch_size = shuffle, batch_size
        self._steps, self._rank, self._world = range(start, stop), rank, world

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield one list of `batch_size / world` draws per step."""
        order = lru_cache(maxsize=2)(self._shuffle.order)  # a batch may touch two epochs
        share = self._batch_size // self._world
        for step in self._steps:
            first = step * self._batch_size + self._rank * share
            places = (divmod(at, self._shuffle.images) for at in range(first, first + share))
            yield [Draw(epoch=epoch, index=int(order(epoch)[place])) for epoch, place in places]

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
    return int(_permutation(f"views/{seed}/{cycle}/{image_id}", views)[place])


def choose_teachers(seed: int, epoch: int, image_id: str, teachers: int, count: int) -> list[int]:
    """Return which `count` of its `teachers` an image asks in an epoch, as ascending indices.

    Each is chosen with probability count / teachers. In every `teachers` epochs, counted from the
    first, an image asks each of them `count` times, in an order of its own.
    """
    if count == teachers:
        return list(range(teachers))
    cycle, place = divmod(epoch, teachers)
    order = _permutation(f"teachers/{seed}/{cycle}/{image_id}", teachers)
    return sorted(int(order[(place * count + k) % teachers]) for k in range(count))


def ask_teachers(
    seed: int,
    draws: Sequence[Draw],
    ids: Sequence[str],
    teachers: Sequence[str],
    count: int | None,
) -> dict[str, list[int] | None]:
    """Return per teacher the positions in a batch of the images that ask it, None for all.

    `ids` are the images of the draws; each asks `count` teachers (None: all).
    """
    if count is None or count == len(teachers):
        return dict.fromkeys(teachers)
    chosen = [
        choose_teachers(seed, draw.epoch, image_id, len(teachers), count)
        for draw, image_id in zip(draws, ids, strict=True)
    ]
    return {
        name: [place for place, some in enumerate(chosen) if number in some]
        for number, name in enumerate(teachers)
    }


def check_teachers_per_image(count: int | None, teachers: Sequence[str]) -> None:
    """Refuse a number of teachers per image that is none of 1 to all.

    Raises:
        TeachersPerImageError: with the choices there are.
    """
    if count is not None and teachers and not 1 <= count <= len(teachers):
        raise TeachersPerImageError(
            f"teachers_per_image: {count}, but there are {len(teachers)} to distil from "
            f"({', '.join(teachers)}); set it to 1 to {len(teachers)}, or leave it out to ask all"
        )


def _permutation(text: str, count: int) -> NDArray[np.int64]:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little"))
    return np.random.Generator(bits).permutation(count)
