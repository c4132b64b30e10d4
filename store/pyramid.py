"""The resolutions of a level: its own grid, and smaller ones that it is area-averaged to."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from store.codecs import Values
from store.spec import Grid, LevelSpec, TeacherSpec


def area_average(row: Values, grid: Grid) -> Values:
    """Return (h, w, C) of a row (H, W, C), h <= H and w <= W: a cell is the mean over its area.

    Cells that a finer one straddles share it by area, so that the mean over the grid is kept.
    """
    height, width, channels = row.shape
    if (height, width) == grid:
        return row
    row = np.asarray(row, np.float32)
    rows = area_weights(height, grid[0]) @ row.reshape(height, width * channels)
    averaged: NDArray[np.float32] = np.matmul(
        area_weights(width, grid[1]), rows.reshape(grid[0], width, channels)
    )
    return averaged


@lru_cache(maxsize=64)
def area_weights(size: int, cells: int) -> NDArray[np.float32]:
    """Return (cells, size): the share of each of `size` unit cells in each of `cells` wider ones."""
    edges = np.arange(cells + 1) * (size / cells)
    low = np.maximum(edges[:-1, None], np.arange(size))
    high = np.minimum(edges[1:, None], np.arange(1, size + 1))
    weights: NDArray[np.float32] = (np.maximum(high - low, 0) * (cells / size)).astype(np.float32)
    return weights


def coarser(grid: Grid, limit: Grid) -> Grid:
    """Return the grid, each side no larger than that of `limit`."""
    return min(grid[0], limit[0]), min(grid[1], limit[1])


def with_limits(spec: TeacherSpec, limits: Sequence[Grid | None]) -> TeacherSpec:
    """Return the teacher with every stored grid at each of these limits (None: as it is)."""
    return replace(spec, levels=tuple(_limited(level, limits) for level in spec.levels))


def _limited(level: LevelSpec, limits: Sequence[Grid | None]) -> LevelSpec:
    grids = {
        grid if limit is None else coarser(grid, limit) for grid in level.stored for limit in limits
    }
    return replace(level, stored=tuple(sorted(grids, reverse=True)))
