"""Finds what of a teacher a level's name and a resolution mean."""

from store.errors import StoreError, nearest
from store.spec import GLOBAL, Grid, LevelSpec, TeacherSpec


def level_names(spec: TeacherSpec) -> tuple[str, ...]:
    """Return the names of the levels, then `global` where there is one."""
    pooled = () if spec.global_channels is None else (GLOBAL,)
    return (*(level.name for level in spec.levels), *pooled)


def find_level(spec: TeacherSpec, level: str) -> LevelSpec:
    """Return a level by name.

    Raises:
        StoreError: there is none, or it is `global`, which has no grid.
    """
    levels = {entry.name: entry for entry in spec.levels}
    if level not in levels:
        raise StoreError(
            f"teacher {spec.name!r} has no grid or statistics of {level!r}: "
            f"{nearest(level, levels)}"
        )
    return levels[level]


def find_array(spec: TeacherSpec, level: str, resolution: Grid | None) -> str:
    """Return the name of the array that holds a level at a resolution, the finest for None.

    Raises:
        StoreError: there is no such level, or it is not stored at that resolution.
    """
    known = level_names(spec)
    if level not in known:
        raise StoreError(f"teacher {spec.name!r} has no level {level!r}: {nearest(level, known)}")
    if level == GLOBAL and resolution is None:
        return GLOBAL
    targets = {target.grid: target.name for target in find_level(spec, level).targets}
    if resolution is None:
        return next(iter(targets.values()))
    if resolution not in targets:
        stored = ", ".join(f"{height} x {width}" for height, width in targets)
        raise StoreError(
            f"teacher {spec.name!r}, level {level!r} is not stored at {resolution}; it is at "
            f"{stored}: choose one of these, or extract again with that resolution"
        )
    return targets[resolution]


def value_shape(spec: TeacherSpec, level: str, resolution: Grid | None) -> tuple[int, ...]:
    """Return the shape of one row as decoded: (H, W, C) of a level, (C,) of `global`.

    Raises:
        StoreError: there is no such level, or it is not stored at that resolution.
    """
    name = find_array(spec, level, resolution)
    if name == GLOBAL and spec.global_channels is not None:
        return (spec.global_channels,)
    target = next(one for one in spec.targets if one.name == name)
    return (*target.grid, target.channels)
