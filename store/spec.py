"""What a teacher writes, as values: its levels, their resolutions, and what decided them."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from store.codecs import parse_codec
from store.errors import StoreError, StoreFormatError

Value = TypeVar("Value")
Grid = tuple[int, int]

FORMAT = "sak-features"
FORMAT_VERSION = 3
GLOBAL = "global"
"""Name of the array that holds a teacher's pooled output."""
EQUIVARIANCE = "equivariance"
"""Name of the group that says how far a teacher's grids follow its images."""
DRIFT = "drift"
"""Name of the group that says how far low precision takes a teacher from float32."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_RESERVED_TEACHERS = frozenset({"images", "views", "zarr.json"})
_RESERVED_LEVELS = frozenset({GLOBAL, EQUIVARIANCE, DRIFT, "valid", "commit", "zarr.json"})


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value, the same on every machine.

    Raises:
        StoreError: the value holds something that JSON cannot, such as NaN or an object.
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise StoreError(f"provenance must be plain JSON values: {error}") from error


def _check_name(kind: str, name: str, reserved: frozenset[str]) -> None:
    if not _NAME.fullmatch(name) or name in reserved:
        raise StoreError(
            f"{name!r} cannot be the name of a {kind}: use letters, digits, '_', '-' and '.', "
            f"starting with a letter or digit, and none of {', '.join(sorted(reserved))}"
        )


def check_count(what: str, count: object) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        StoreError: it is not.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise StoreError(f"{what} must be a whole number of at least 1, got {count!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A level at one of its resolutions: `grid` (H, W) tokens of `channels` values."""

    level: str
    grid: Grid
    channels: int
    resolution: str

    @property
    def name(self) -> str:
        """The path of its array below the teacher: level and resolution."""
        return f"{self.level}/{self.resolution}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelSpec:
    """The output of one tapped block or stage: `grid` is (H, W) tokens of `channels` values.

    `stored` are the grids it is kept at, finest first: its own, or smaller ones that it is
    area-averaged to; left out, its own alone.
    """

    name: str
    grid: Grid
    channels: int
    stored: tuple[Grid, ...] = ()

    def __post_init__(self) -> None:
        _check_name("level", self.name, _RESERVED_LEVELS)
        for side in self.grid:
            check_count(f"grid of level {self.name!r}", side)
        check_count(f"channels of level {self.name!r}", self.channels)
        object.__setattr__(self, "stored", self.stored or (self.grid,))
        for grid in self.stored:
            for side, whole in zip(grid, self.grid, strict=True):
                check_count(f"stored grid of level {self.name!r}", side)
                if side > whole:
                    raise StoreError(
                        f"level {self.name!r} has a grid of {self.grid}, it cannot be stored at "
                        f"{grid}; ask for smaller resolutions"
                    )
        if list(self.stored) != sorted(set(self.stored), reverse=True):
            raise StoreError(
                f"level {self.name!r}: stored grids must differ, finest first: {self.stored}"
            )

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is stored of the level, finest first."""
        return tuple(
            Target(
                level=self.name,
                grid=grid,
                channels=self.channels,
                resolution="native" if grid == self.grid else f"{grid[0]}x{grid[1]}",
            )
            for grid in self.stored
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpec:
    """What a teacher writes, and everything that decides its values (`provenance`, plain JSON).

    `codec` is how its levels are stored, see `store.codecs`; the pooled output is float32 where
    that says so, else float16.

    Raises:
        StoreError: a bad or repeated name, no levels, or provenance that JSON cannot hold.
    """

    name: str
    levels: tuple[LevelSpec, ...]
    global_channels: int | None = None
    provenance: Mapping[str, Any]
    codec: str = "float16"

    def __post_init__(self) -> None:
        _check_name("teacher", self.name, _RESERVED_TEACHERS)
        parse_codec(self.codec)
        names = [level.name for level in self.levels]
        if not names or len(set(names)) != len(names):
            raise StoreError(f"teacher {self.name!r} needs levels of different names, got {names}")
        if self.global_channels is not None:
            check_count(f"global_channels of teacher {self.name!r}", self.global_channels)
        # What is compared later has been through JSON, so tuples must become lists here too.
        object.__setattr__(self, "provenance", json.loads(canonical_json(dict(self.provenance))))

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every level at every resolution that is stored."""
        return tuple(target for level in self.levels for target in level.targets)

    def fingerprint(self) -> str:
        """Return a SHA-256 in hexadecimal of name, levels, codec and provenance."""
        return hashlib.sha256(canonical_json(self.to_attributes()).encode()).hexdigest()

    def to_attributes(self) -> dict[str, Any]:
        """Return the spec as plain JSON values."""
        return {
            "name": self.name,
            "levels": [
                {
                    "name": level.name,
                    "grid": list(level.grid),
                    "channels": level.channels,
                    "stored": [list(grid) for grid in level.stored],
                }
                for level in self.levels
            ],
            "codec": self.codec,
            "global_channels": self.global_channels,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "TeacherSpec":
        """Return the spec that `to_attributes` wrote.

        Raises:
            StoreFormatError: the attributes are not those of a teacher.
        """
        try:
            levels = tuple(
                LevelSpec(
                    name=_typed(level["name"], str),
                    grid=_pair(level["grid"]),
                    channels=_typed(level["channels"], int),
                    stored=tuple(_pair(grid) for grid in _typed(level["stored"], list)),
                )
                for level in _typed(attributes["levels"], list)
            )
            channels = attributes["global_channels"]
            return cls(
                name=_typed(attributes["name"], str),
                levels=levels,
                global_channels=None if channels is None else _typed(channels, int),
                codec=_typed(attributes["codec"], str),
                provenance=_typed(attributes["provenance"], dict),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreFormatError(f"the attributes describe no teacher: {error!r}") from error


def _typed(value: Any, kind: type[Value]) -> Value:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


def _pair(value: object) -> tuple[int, int]:
    height, width = _typed(value, list)
    return _typed(height, int), _typed(width, int)
