"""Which blocks or stages of a network are tapped, and what their outputs are called."""

from collections.abc import Sequence

from stages.extract.errors import TeacherError


def is_staged(reductions: Sequence[int]) -> bool:
    """Tell a hierarchical network from one whose layers all have the same grid."""
    return len(set(reductions)) > 1


def choose_taps(levels: int | Sequence[int], reductions: Sequence[int]) -> tuple[int, ...]:
    """Return the zero-based indices of the layers to tap, ascending.

    `reductions` holds input pixels per grid cell for every layer that can be tapped. A number
    means evenly spaced blocks ending at the last (12 blocks, 4 levels: 2, 5, 8, 11, as in the
    paper), or the last stages of a hierarchical network, whose first ones are mere stems.

    Raises:
        TeacherError: more levels than layers, an index out of range, or indices not ascending.
    """
    count, kind = len(reductions), "stage" if is_staged(reductions) else "block"
    if isinstance(levels, int):
        if not 1 <= levels <= count:
            raise TeacherError(f"levels: {levels} asked for, but the model has {count} {kind}s")
        if kind == "stage":
            return tuple(range(count - levels, count))
        return tuple((level + 1) * count // levels - 1 for level in range(levels))
    taps = tuple(levels)
    if not taps or min(taps) < 0 or max(taps) >= count:
        raise TeacherError(
            f"levels: the model's {kind}s are numbered 0 to {count - 1}, got {list(taps)}"
        )
    if list(taps) != sorted(set(taps)):
        raise TeacherError(f"levels: {kind}s must be ascending and differ, got {list(taps)}")
    return taps


def level_names(taps: Sequence[int], reductions: Sequence[int]) -> tuple[str, ...]:
    """Return the store's name of each tapped layer: `block_02`, or `stage_3` when hierarchical."""
    if is_staged(reductions):
        return tuple(f"stage_{tap}" for tap in taps)
    return tuple(f"block_{tap:02d}" for tap in taps)
