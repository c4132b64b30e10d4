"""What a teacher's answer must be like before it is stored."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from store.codecs import FLOAT16_MAX, Codes, Values
from store.errors import StoreError
from store.spec import GLOBAL, TeacherSpec
from store.statistics import Moments
from store.teacher_layout import TeacherLayout

_EXPONENTS = {"<f2": ("<u2", 0x7C00), "<f4": ("<u4", 0x7F800000)}
"""For each float type the integer of its size, and the bits that only NaN and infinity fill."""


def check_rows(
    spec: TeacherSpec,
    rows: range,
    levels: Mapping[str, Values],
    pooled: Values | None,
    valid: NDArray[np.bool_],
) -> dict[str, Values]:
    """Return the features of `rows` by level and `global`, after checking that they can be stored.

    Raises:
        StoreError: wrong names or shapes, or values that `check_values` refuses.
    """
    given = dict(levels) if pooled is None else {**levels, GLOBAL: pooled}
    shapes: dict[str, tuple[int, ...]] = {
        level.name: (*level.grid, level.channels) for level in spec.levels
    }
    if spec.global_channels is not None:
        shapes[GLOBAL] = (spec.global_channels,)
    if given.keys() != shapes.keys():
        raise StoreError(
            f"teacher {spec.name!r} has {', '.join(shapes)}; got {', '.join(given) or 'nothing'}"
        )
    if valid.shape != (len(rows),):
        raise StoreError(f"valid must have shape {(len(rows),)}, got {valid.shape}")
    for level, shape in shapes.items():
        where = f"teacher {spec.name!r}, level {level!r}"
        if given[level].shape != (len(rows), *shape):
            raise StoreError(
                f"{where}: expected shape {(len(rows), *shape)}, got {given[level].shape}"
            )
        narrow = spec.codec == "float16" or (level == GLOBAL and spec.codec != "float32")
        check_values(given[level], valid, rows.start, where, FLOAT16_MAX if narrow else np.inf)
    return given


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


def check_codes(
    layout: TeacherLayout, codes: Mapping[str, Codes], valid: NDArray[np.bool_], rows: range
) -> None:
    """Refuse codes of `rows` that are not as the teacher's arrays want them.

    Raises:
        StoreError: wrong names, shapes or types; NaN or infinity; a quarantined row that is not
            zero.
    """
    arrays, name = layout.features(), layout.spec.name
    if valid.dtype != np.bool_ or valid.shape != (len(rows),):
        raise StoreError(
            f"valid must be bool of shape {(len(rows),)}, got {valid.dtype} of {valid.shape}"
        )
    if codes.keys() != arrays.keys():
        raise StoreError(f"teacher {name!r} stores {', '.join(arrays)}; got {', '.join(codes)}")
    for target, array in arrays.items():
        found, where = codes[target], f"teacher {name!r}, {target!r}"
        expected = (array.dtype, (len(valid), *array.shape[1:]))
        if (found.dtype.str, found.shape) != expected:
            raise StoreError(
                f"{where}: expected codes {expected}, got {(found.dtype.str, found.shape)}"
            )
        if found[~valid].any():
            raise StoreError(f"{where}: codes of quarantined rows must be zero")
        if array.dtype in _EXPONENTS:
            bad = np.array([_not_finite(row, array.dtype) for row in found])
            if bad.any():
                raise StoreError(f"{where}: {_rows(bad, rows.start)} hold NaN or infinity")


def check_moments(where: object, found: Moments, like: Moments) -> None:
    """Refuse what cannot be moments of as many channels as `like`; looks at nothing twice.

    Numbers that are not finite stay so however many are merged: see `check_finite`.

    Raises:
        StoreError: other shapes, co-moments where none are kept or none where they are, or sums of
            squares below zero.
    """
    if _shapes(found) != _shapes(like):
        raise StoreError(
            f"{where}: expected moments (mean, M2, co-moments) of shapes {_shapes(like)}, got "
            f"{_shapes(found)}"
        )
    if found.count < 0 or found.m2.min() < 0:
        raise StoreError(f"{where}: moments must not have sums of squares below zero")


def check_finite(where: object, found: Moments) -> None:
    """Refuse moments with NaN or infinity.

    Raises:
        StoreError: there are some.
    """
    parts = (found.mean, found.m2, found.comoment)
    if not all(np.isfinite(one).all() for one in parts if one is not None):
        raise StoreError(f"{where}: moments must be finite")


def _shapes(moments: Moments) -> tuple[tuple[int, ...] | None, ...]:
    comoment = None if moments.comoment is None else moments.comoment.shape
    return moments.mean.shape, moments.m2.shape, comoment


def _not_finite(row: Codes, dtype: str) -> bool:
    """Tell whether a row has NaN or infinity, by its bits: float16 has no fast arithmetic."""
    integer, exponent = _EXPONENTS[dtype]
    bits = np.ascontiguousarray(row).view(integer)
    return bool((bits & exponent).max() == exponent)


def _rows(bad: NDArray[np.bool_], first_row: int) -> str:
    rows = np.flatnonzero(bad)
    names = ", ".join(str(first_row + row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    return f"{len(rows)} rows ({names})"
