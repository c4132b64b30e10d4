"""How targets are turned into what is stored; float16 is the only codec of format 1 so far."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError

FLOAT16_MAX = float(np.finfo(np.float16).max)


def encode_float16(
    values: NDArray[np.floating[Any]],
    valid: NDArray[np.bool_],
    *,
    first_row: int,
    teacher: str,
    level: str,
) -> NDArray[np.float16]:
    """Return `values` (n, ..., C) rounded to float16, rows that are not `valid` (n,) as zeros.

    Raises:
        StoreError: a valid row is not finite, or exceeds what float16 can hold.
    """
    axes = tuple(range(1, values.ndim))
    with np.errstate(invalid="ignore"):
        highest = np.maximum(values.max(axis=axes), -values.min(axis=axes))  # NaN spreads
    highest = np.where(valid, highest, 0.0)
    _refuse(~np.isfinite(highest), highest, first_row, f"teacher {teacher!r}, level {level!r}")
    _refuse(highest > FLOAT16_MAX, highest, first_row, f"teacher {teacher!r}, level {level!r}")
    if valid.all():
        return np.ascontiguousarray(values, np.float16)
    stored = np.zeros(values.shape, np.float16)
    stored[valid] = values[valid]
    return stored


def _refuse(bad: NDArray[np.bool_], highest: NDArray[Any], first_row: int, where: str) -> None:
    if not bad.any():
        return
    rows = np.flatnonzero(bad)
    names = ", ".join(str(first_row + row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    worst = float(highest[bad].max())
    if np.isfinite(worst):
        raise StoreError(
            f"{where}: {len(rows)} rows exceed float16 (largest magnitude {worst:g}, the type "
            f"holds {FLOAT16_MAX:g}): rows {names}; leave this level out or scale it down"
        )
    raise StoreError(
        f"{where}: {len(rows)} rows hold NaN or infinity: rows {names}; check the teacher's "
        "weights and precision (fp16 overflows where bf16 and fp32 do not)"
    )
