"""Features become codes, on the processor and in numpy.

Letters: `n` rows, `H W` grid of a level, `C` channels.
"""

from collections.abc import Mapping
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from store.codecs import Codec, Codes, Values
from store.pyramid import area_average
from store.spec import Grid
from store.teacher_layout import TeacherLayout


def encode(
    layout: TeacherLayout,
    codecs: Mapping[str, Codec],
    values: Mapping[str, Values],
    valid: NDArray[np.bool_],
    pool: Executor,
) -> dict[str, Codes]:
    """Return the codes (n, ...) of every target and of `global`, by name.

    `values` are (n, H, W, C) by level and (n, C) for `global`; rows that `valid` (n,) marks False
    become zeros. The targets are worked on at the same time, as many as `pool` has threads.
    """
    targets = {target.name: target for target in layout.spec.targets}

    def one(name: str) -> Codes:
        target = targets.get(name)
        level, grid = (name, None) if target is None else (target.level, target.grid)
        nothing = np.zeros(arrays[name].shape[1:], arrays[name].dtype)
        rows = zip(values[level], valid, strict=True)
        return np.stack([_row(codecs[name], row, grid) if good else nothing for row, good in rows])

    arrays = layout.features()
    return dict(zip(arrays, pool.map(one, arrays), strict=True))


def _row(codec: Codec, row: Values, grid: Grid | None) -> Codes:
    return codec.encode(row if grid is None else area_average(row, grid))
