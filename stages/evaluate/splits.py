"""Which images a probe learns from and which it is measured on."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath

import numpy as np

from stages.data.dataset import Dataset
from stages.data.images import OK
from stages.data.sources import SPLITS
from store.reader import FeatureStore

VAL_SHARE = 0.2
"""Share of the images that are measured on where the folders do not say which."""


class SplitError(ValueError):
    """There is nothing to learn from, or nothing to measure on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Image ids to learn from and to measure on."""

    train: tuple[str, ...]
    val: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSplits(Splits):
    """The same for images of a class each."""

    classes: tuple[str, ...]
    """Names of the classes, in order."""
    labels: dict[str, int]
    """Index of each image's class."""


def usable(store: FeatureStore, ids: Sequence[str], teachers: Sequence[str]) -> tuple[str, ...]:
    """Return those images that can be read and have features of all `teachers`, in view 0.

    Raises:
        StoreError: an image is not in the store.
    """
    views = store.views.views_per_image
    good = np.array([status == OK for status in store.images.statuses])
    for name in teachers:
        good &= store.valid(name)[::views]
    return tuple(one for one in ids if good[store.row(one) // views])


def labelled_splits(store: FeatureStore, dataset: Dataset, teachers: Sequence[str]) -> Splits:
    """Return the usable images of the splits `train` and `val` of a data set.

    Raises:
        SplitError: one of them has none.
    """
    train, val = (usable(store, dataset.split(name), teachers) for name in SPLITS)
    for name, ids in (("train", train), ("val", val)):
        if not ids:
            raise SplitError(
                f"no image of split '{name}' has features of every teacher; `sak inspect` shows "
                "which ones were quarantined and why"
            )
    return Splits(train=train, val=val)


def class_splits(ids: Sequence[str]) -> ClassSplits:
    """Read classes off image ids: `CLASS/image`, or `train/CLASS/image` and `val/CLASS/image`.

    Without the folders `train` and `val`, images are set apart for measuring by a hash of their
    ids: every fifth or so, always the same ones.

    Raises:
        SplitError: images outside a class, fewer than two classes, or an empty side.
    """
    parts = {one: PurePosixPath(one).parts for one in ids}
    said = all(len(part) > 2 and part[0] in SPLITS for part in parts.values())
    depth = 1 if said else 0
    if outside := [one for one, part in parts.items() if len(part) < depth + 2]:
        raise SplitError(
            f"{len(outside)} images lie in no class folder, the first being '{outside[0]}'; a "
            "class probe needs images at CLASS/image or at train/CLASS/image and val/CLASS/image"
        )
    names = tuple(sorted({part[depth] for part in parts.values()}))
    index = {name: number for number, name in enumerate(names)}
    held_out = {one for one, part in parts.items() if (part[0] == "val" if said else _drawn(one))}
    train = tuple(one for one in ids if one not in held_out)
    val = tuple(one for one in ids if one in held_out)
    if len({parts[one][depth] for one in train}) < 2 or not val:
        raise SplitError(
            f"{len(train)} images of {len(names)} classes to learn from and {len(val)} to measure "
            "on: at least two classes and one image to measure are needed"
        )
    return ClassSplits(
        train=train,
        val=val,
        classes=names,
        labels={one: index[part[depth]] for one, part in parts.items()},
    )


def _drawn(image_id: str) -> bool:
    number = int.from_bytes(sha256(image_id.encode()).digest()[:8], "big")
    return number < VAL_SHARE * 2**64
