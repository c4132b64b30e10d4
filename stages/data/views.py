"""Draws the views of every image, and reads them back from a store's view table.

What is drawn for a view follows from (seed, image id, view number) alone: a hash of the three keys
numpy's Philox generator, whose raw 64-bit output is the same on every machine and in every version
of numpy. Only additions, products, quotients and square roots follow, which IEEE 754 rounds in one
way.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stages.data.config import PhotometricConfig, ViewsConfig
from stages.data.photometric import Photometric
from stages.data.view import Box, View, whole_image_box
from store.images import ImageTable, ViewTable

_DRAWS = 9  # area, aspect, top, left, flip, brightness, contrast, saturation, hue
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def draw_views(images: ImageTable, image_size: tuple[int, int], config: ViewsConfig) -> ViewTable:
    """Return the views of every image: view 0 the whole image, the others drawn.

    A view's seed is kept in the table, 0 for view 0. A quarantined image has no size: its boxes are
    empty, its seeds 0.
    """
    count = config.count
    rows = len(images) * count
    boxes, flips = np.zeros((rows, 4), np.float32), np.zeros(rows, np.bool_)
    seeds = np.zeros(rows, np.uint64)
    colours = np.tile(np.array(_NEUTRAL, np.float32), (rows, 1))
    sizes = zip(images.ids, images.heights, images.widths, strict=True)
    for first, (name, height, width) in zip(range(0, rows, count), sizes, strict=True):
        if not (height and width):
            continue
        boxes[first] = _sides(whole_image_box(height, width, image_size))
        for row in range(first + 1, first + count):
            seeds[row] = view_seed(config.seed, name, row - first)
            chances = _chances(int(seeds[row]))
            boxes[row] = _sides(_crop(height, width, image_size, config, chances))
            flips[row] = chances[4] < config.flip
            if config.photometric is not None:
                colours[row] = _colours(config.photometric, chances[5:])
    return ViewTable(
        image_size=image_size,
        boxes=boxes,
        flips=flips,
        seeds=seeds,
        views_per_image=count,
        photometric=None if config.photometric is None else colours,
    )


def row_view(views: ViewTable, row: int) -> View:
    """Return how the pixels of a row are made."""
    top, left, height, width = (int(side) for side in views.boxes[row])
    return View(
        box=Box(top=top, left=left, height=height, width=width),
        flip=bool(views.flips[row]),
        photometric=_photometric(views.photometric, row),
    )


def view_seed(seed: int, image_id: str, view: int) -> int:
    """Return the seed of one view, 64 bits of a hash of what decides it."""
    digest = hashlib.blake2b(f"view/{seed}/{view}/{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _chances(seed: int) -> list[float]:
    """Return numbers from 0 to below 1, 53 bits each."""
    raw = np.random.Philox(key=seed).random_raw(_DRAWS)
    return [int(bits >> 11) * 2.0**-53 for bits in raw.tolist()]


def _crop(
    height: int,
    width: int,
    image_size: tuple[int, int],
    config: ViewsConfig,
    chances: Sequence[float],
) -> Box:
    """Return a part of an image: its area and shape are drawn, then where it lies."""
    whole = whole_image_box(height, width, image_size)
    smallest, largest = config.area
    area = smallest + (largest - smallest) * chances[0]
    stretch = _stretch(config.aspect, 2 * chances[1] - 1)
    rows = _side(whole.height * math.sqrt(area * stretch), height)
    columns = _side(whole.width * math.sqrt(area / stretch), width)
    return Box(
        top=int(chances[2] * (height - rows + 1)),
        left=int(chances[3] * (width - columns + 1)),
        height=rows,
        width=columns,
    )


def _stretch(aspect: float, chance: float) -> float:
    """Return a ratio from 1 / aspect (chance -1) over 1 (0) to aspect (1)."""
    ratio = 1 + (aspect - 1) * abs(chance)
    return ratio if chance > 0 else 1 / ratio


def _side(exact: float, limit: int) -> int:
    return max(1, min(limit, math.floor(exact + 0.5)))


def _sides(box: Box) -> tuple[int, int, int, int]:
    return box.top, box.left, box.height, box.width


def _colours(config: PhotometricConfig, chances: Sequence[float]) -> list[float]:
    ranges = (config.brightness, config.contrast, config.saturation, config.hue)
    return [
        middle + reach * (2 * chance - 1)
        for middle, reach, chance in zip(_NEUTRAL, ranges, chances, strict=True)
    ]


def _photometric(table: npt.NDArray[np.float32] | None, row: int) -> Photometric | None:
    if table is None or tuple(table[row].tolist()) == _NEUTRAL:
        return None
    brightness, contrast, saturation, hue = table[row].tolist()
    return Photometric(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
