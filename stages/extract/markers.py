"""Where a teacher sees what: white markers in an image, looked for in the grids of its levels.

A marker is found by what it changes: features of the marked image less those of the plain one.
So it works with any weights, random ones included. Letters: `B h w C` as in `Features`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stages.data.view import whole_image_box
from stages.extract.teachers import Teacher

_Cell = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkersFound:
    """How far from their places a level shows markers, in cells of the teacher's coarsest grid.

    `distance` is that of the worst marker's strongest cell, the larger of its rows and columns;
    `missed` counts the markers whose strongest cell is more than one away;
    `offset` is the mean of (down, right) over markers away from the border, from the middle of
    the cells that answer at least half as strongly as the strongest.
    """

    level: str
    distance: int
    missed: int
    offset: tuple[float, float]


def find_markers(
    teacher: Teacher, view: tuple[int, int], *, flipped: bool = False
) -> tuple[MarkersFound, ...]:
    """Plant a marker in each of four cells, one image each, and look for it in every level.

    Images have twice the size of `view` (height, width) in pixels; `flipped` mirrors their pixels.
    """
    grid = min(level.grid for level in teacher.spec.levels)
    cells = _places(grid)
    height, width = 2 * view[0], 2 * view[1]
    plain = _background((height, width))
    pictures = [plain, *(_marked(plain, cell, grid) for cell in cells)]
    if flipped:
        pictures = [np.ascontiguousarray(picture[:, ::-1]) for picture in pictures]
        cells = [(row, grid[1] - 1 - column) for row, column in cells]
    box = whole_image_box(height, width, view)
    features = teacher(torch.stack([teacher.preprocess(picture, box) for picture in pictures]))
    return tuple(
        _locate(name, (values[1:] - values[:1]).norm(dim=-1), cells, grid)
        for name, values in features.levels.items()
    )


def _places(grid: _Cell) -> list[_Cell]:
    """Two corners and two cells inside; any flip or turn moves most of them."""
    rows, columns = grid
    return [
        (0, 0),
        (rows - 1, columns - 1),
        (rows // 3, 2 * columns // 3),
        (2 * rows // 3, columns // 4),
    ]


def _background(size: tuple[int, int]) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(0).integers(64, 160, (6, 8, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def _marked(plain: NDArray[np.uint8], cell: _Cell, grid: _Cell) -> NDArray[np.uint8]:
    marked = plain.copy()
    down, right = (
        slice(round(index * side / count), round((index + 1) * side / count))
        for index, side, count in zip(cell, plain.shape, grid, strict=False)
    )
    marked[down, right] = 255
    return marked


def _locate(level: str, change: Tensor, cells: Sequence[_Cell], grid: _Cell) -> MarkersFound:
    """Compare where `change` (marker, h, w) is largest with the `cells` that were marked."""
    pooled = functional.adaptive_avg_pool2d(change[:, None], grid)[:, 0].flatten(1)
    peaks = [divmod(index, grid[1]) for index in pooled.argmax(1).tolist()]
    away = [
        max(abs(found - true) for found, true in zip(peak, cell, strict=True))
        for peak, cell in zip(peaks, cells, strict=True)
    ]
    inside = [_offset(one, cell, grid) for one, cell in zip(change[2:], cells[2:], strict=True)]
    down, right = np.mean(inside, axis=0).tolist()
    missed = sum(distance > 1 for distance in away)
    return MarkersFound(level=level, distance=max(away), missed=missed, offset=(down, right))


def _offset(change: Tensor, cell: _Cell, grid: _Cell) -> tuple[float, float]:
    """Return how far (down, right) of the middle of `cell` the middle of the change (h, w) lies."""
    strong = torch.where(change >= change.max() / 2, change, 0).double().cpu()
    middles = []
    for axis, (index, count) in enumerate(zip(cell, grid, strict=True)):
        weight = strong.sum(dim=1 - axis)
        centres = (torch.arange(len(weight)) + 0.5) * count / len(weight)
        middles.append(float((centres * weight).sum() / weight.sum()) - index - 0.5)
    return middles[0], middles[1]
