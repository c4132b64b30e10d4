"""The resolutions of a level: its own grid, and smaller ones that it is area-averaged to."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int]


def area_average(row: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """Return (h, w, C) of a row (H, W, C), h <= H and w <= W: each cell is the mean over its area.

    Cells that a finer one straddles share it by area, so that the mean over the grid is kept.
    """
    height, width, channels = row.shape
    if (height, width) == grid:
        return row
    rows = _weights(height, grid[0]) @ row.reshape(height, width * channels)
    return np.matmul(_weights(width, grid[1]), rows.reshape(grid[0], width, channels))


@lru_cache(maxsize=64)
def _weights(size: int, cells: int) -> NDArray[np.float32]:
    """Return (cells, size): the share of each of `size` unit cells in each of `cells` wider ones."""
    edges = np.arange(cells + 1) * (size / cells)
    low = np.maximum(edges[:-1, None], np.arange(size))
    high = np.minimum(edges[1:, None], np.arange(1, size + 1))
    return (np.maximum(high - low, 0) * (cells / size)).astype(np.float32)
