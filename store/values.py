"""What a teacher's answer must be like before it is stored."""

import numpy as np
from numpy.typing import NDArray

from store.codecs import FLOAT16_MAX, Values
from store.errors import StoreError


def check_values(
    values: Values, valid: NDArray[np.bool_], first_row: int, where: str, limit: float
) -> None:
    """Refuse features that cannot be stored, `values` (n, ..., C) of rows from `first_row` on.

    Raises:
        StoreError: a valid row, by `valid` (n,), holds NaN, infinity or more than `limit`.
    """
    axes = tuple(range(1, values.ndim))
    with np.errstate(invalid="ignore"):
        highest = np.maximum(values.max(axis=axes), -values.min(axis=axes))  # NaN spreads
    highest = np.where(valid, highest, 0.0)
    bad = ~np.isfinite(highest)
    if bad.any():
        raise StoreError(
            f"{where}: {_rows(bad, first_row)} hold NaN or infinity; check the teacher's weights "
            "and precision (fp16 overflows where bf16 and fp32 do not)"
        )
    bad = highest > limit
    if bad.any():
        raise StoreError(
            f"{where}: {_rows(bad, first_row)} exceed float16 (largest magnitude "
            f"{highest.max():g}, the type holds {FLOAT16_MAX:g}); choose codec int8 or float32, or "
            "leave this level out"
        )


def _rows(bad: NDArray[np.bool_], first_row: int) -> str:
    rows = np.flatnonzero(bad)
    names = ", ".join(str(first_row + row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    return f"{len(rows)} rows ({names})"
