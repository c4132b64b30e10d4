"""What a store holds, as values: the images, their views, each teacher and its levels.

A row is one (image, view) pair: `row = image * views_per_image + view`. Everything is joined by
image id; the digests here are what tells two stores apart.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from store.codecs import parse_codec
from store.errors import StoreError, StoreFormatError

Value = TypeVar("Value")
Grid = tuple[int, int]

FORMAT = "sak-features"
FORMAT_VERSION = 2
GLOBAL = "global"
"""Name of the array that holds a teacher's pooled output."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RESERVED_TEACHERS = frozenset({"images", "views", "zarr.json"})
_RESERVED_LEVELS = frozenset({GLOBAL, "valid", "commit", "zarr.json"})


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


def _check_count(what: str, count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise StoreError(f"{what} must be a whole number of at least 1, got {count!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTable:
    """The ordered list of images: one entry per image.

    `sha256` is the digest of the file in hexadecimal, or "" where it could not be read; `heights`
    and `widths` are pixels (0 where unknown); `statuses` is "ok" or the reason of quarantine.

    Raises:
        StoreError: no images, columns of different lengths, an empty or repeated id, a bad digest.
    """

    ids: tuple[str, ...]
    sha256: tuple[str, ...]
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    statuses: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self._columns()}
        if len(lengths) != 1 or lengths == {0}:
            raise StoreError(f"an image table needs equal, non-empty columns, got {lengths}")
        if len(set(self.ids)) != len(self.ids):
            repeated = Counter(self.ids).most_common(1)[0][0]
            raise StoreError(f"image id {repeated!r} occurs more than once; ids must be unique")
        for text in (*self.ids, *self.statuses):
            if not text or "\0" in text:
                raise StoreError(f"image ids and statuses must be non-empty text, got {text!r}")
        for digest in self.sha256:
            if digest and not _SHA256.fullmatch(digest):
                raise StoreError(f"sha256 must be 64 lower-case hex digits or '', got {digest!r}")

    def __len__(self) -> int:
        return len(self.ids)

    def _columns(self) -> tuple[tuple[Any, ...], ...]:
        return (self.ids, self.sha256, self.heights, self.widths, self.statuses)

    def take(self, places: Sequence[int]) -> "ImageTable":
        """Return the images at these places, in their order."""
        ids, sha256, heights, widths, statuses = (
            tuple(column[place] for place in places) for column in self._columns()
        )
        return ImageTable(ids=ids, sha256=sha256, heights=heights, widths=widths, statuses=statuses)

    def image_set(self) -> frozenset[tuple[Any, ...]]:
        """Return the entries without their order."""
        return frozenset(zip(*self._columns(), strict=True))

    def digest(self) -> str:
        """Return a SHA-256 in hexadecimal that changes with order and with any value."""
        state = hashlib.sha256()
        for entry in zip(*self._columns(), strict=True):
            state.update(canonical_json(entry).encode() + b"\n")
        return state.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ViewTable:
    """How each row's pixels are cut from its image; two tables are equal when their digests are.

    `image_size` is (height, width) in pixels of every view; `boxes` is rows x 4 float32 (top, left,
    height, width in source pixels); `flips` is a row of bool, `seeds` a row of uint64.

    Raises:
        StoreError: columns of different lengths, or rows that are no multiple of the views.
    """

    image_size: tuple[int, int]
    boxes: NDArray[Any]
    flips: NDArray[Any]
    seeds: NDArray[Any]
    views_per_image: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", np.ascontiguousarray(self.boxes, "<f4"))
        object.__setattr__(self, "flips", np.ascontiguousarray(self.flips, "?"))
        object.__setattr__(self, "seeds", np.ascontiguousarray(self.seeds, "<u8"))
        for side in self.image_size:
            _check_count("image_size", side)
        _check_count("views_per_image", self.views_per_image)
        rows = len(self.flips)
        if (self.boxes.shape, self.flips.shape, self.seeds.shape) != ((rows, 4), (rows,), (rows,)):
            raise StoreError(
                f"views need boxes (rows, 4), flips (rows,) and seeds (rows,), got "
                f"{self.boxes.shape}, {self.flips.shape} and {self.seeds.shape}"
            )
        if rows % self.views_per_image:
            raise StoreError(f"{rows} rows are no multiple of {self.views_per_image} views")

    def __len__(self) -> int:
        return len(self.flips)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ViewTable) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def first(self, rows: int) -> "ViewTable":
        """Return the first rows."""
        return ViewTable(
            image_size=self.image_size,
            boxes=self.boxes[:rows],
            flips=self.flips[:rows],
            seeds=self.seeds[:rows],
            views_per_image=self.views_per_image,
        )

    def digest(self) -> str:
        """Return a SHA-256 in hexadecimal of the geometry of every row, in order."""
        head = canonical_json([list(self.image_size), self.views_per_image, len(self)])
        state = hashlib.sha256(head.encode())
        for column in (self.boxes, self.flips, self.seeds):
            state.update(column.tobytes())
        return state.hexdigest()


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
            _check_count(f"grid of level {self.name!r}", side)
        _check_count(f"channels of level {self.name!r}", self.channels)
        object.__setattr__(self, "stored", self.stored or (self.grid,))
        for grid in self.stored:
            for side, whole in zip(grid, self.grid, strict=True):
                _check_count(f"stored grid of level {self.name!r}", side)
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
            _check_count(f"global_channels of teacher {self.name!r}", self.global_channels)
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
