"""Which part of a view an epoch shows where stored grids are reused, see `stages.train.regrid`."""

import hashlib
import math

import numpy as np

from stages.data.view import Box, View
from stages.train.config import ReuseConfig

SMALLEST_SIDE = 0.5
"""A part shows at least this share of each side: the enlargement that was measured."""


def draw_part(
    reuse: ReuseConfig, size: tuple[int, int], seed: int, epoch: int, image_id: str
) -> View:
    """Return which part of a view of `size` (rows, columns of pixels) an epoch shows, mirrored or not.

    The same whoever asks and in whatever order. Parts keep the view's shape, to a pixel.
    """
    digest = hashlib.blake2b(f"reuse/{seed}/{epoch}/{image_id}".encode(), digest_size=16).digest()
    key = int.from_bytes(digest, "little")
    flip, side, top, left = np.random.Generator(np.random.Philox(key=key)).random(4).tolist()
    share = 1.0 if reuse.crop is None else SMALLEST_SIDE + (1 - SMALLEST_SIDE) * side
    rows, columns = (math.ceil(share * full) for full in size)
    box = Box(
        top=int(top * (size[0] - rows + 1)),
        left=int(left * (size[1] - columns + 1)),
        height=rows,
        width=columns,
    )
    return View(box=box, flip=reuse.flip is not None and flip < 0.5)


def part_shares(part: View, size: tuple[int, int]) -> tuple[float, float, float, float, float]:
    """Return a part as a row of `Batch.parts`: flip (0 or 1), top, left, height, width (shares)."""
    (rows, columns), box = size, part.box
    return (
        float(part.flip),
        box.top / rows,
        box.left / columns,
        box.height / rows,
        box.width / columns,
    )
