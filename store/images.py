"""The images of a store and their views, as values.

A row is one (image, view) pair: `row = image * views_per_image + view`. Everything is joined by
image id; the digests here are what tells two stores apart.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError
from store.spec import canonical_json, check_count

OK = "ok"
"""Status of an image that can be used; any other is the reason why it cannot."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


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

    @classmethod
    def of(cls, entries: Sequence[tuple[Any, ...]]) -> "ImageTable":
        """Return the table of these entries, see `entry`."""
        ids, sha256, heights, widths, statuses = zip(*entries, strict=True)
        return cls(ids=ids, sha256=sha256, heights=heights, widths=widths, statuses=statuses)

    def entry(self, place: int) -> tuple[Any, ...]:
        """Return id, sha256, height, width and status of the image at this place."""
        return tuple(column[place] for column in self._columns())

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
    `photometric` is rows x 4 float32 (factors of brightness, contrast and saturation, shift of hue
    in turns), None where views keep the colours of their image.

    Raises:
        StoreError: columns of different lengths, rows that are no multiple of the views, or factors
            below 0 or not finite.
    """

    image_size: tuple[int, int]
    boxes: NDArray[Any]
    flips: NDArray[Any]
    seeds: NDArray[Any]
    views_per_image: int = 1
    photometric: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", np.ascontiguousarray(self.boxes, "<f4"))
        object.__setattr__(self, "flips", np.ascontiguousarray(self.flips, "?"))
        object.__setattr__(self, "seeds", np.ascontiguousarray(self.seeds, "<u8"))
        for side in self.image_size:
            check_count("image_size", side)
        check_count("views_per_image", self.views_per_image)
        rows = len(self.flips)
        if (self.boxes.shape, self.flips.shape, self.seeds.shape) != ((rows, 4), (rows,), (rows,)):
            raise StoreError(
                f"views need boxes (rows, 4), flips (rows,) and seeds (rows,), got "
                f"{self.boxes.shape}, {self.flips.shape} and {self.seeds.shape}"
            )
        if rows % self.views_per_image:
            raise StoreError(f"{rows} rows are no multiple of {self.views_per_image} views")
        if self.photometric is not None:
            object.__setattr__(self, "photometric", _factors(self.photometric, rows))

    def __len__(self) -> int:
        return len(self.flips)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ViewTable) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def first(self, rows: int) -> "ViewTable":
        """Return the first rows."""
        return self._rows(slice(rows))

    def of_images(self, places: Sequence[int]) -> "ViewTable":
        """Return the views of the images at these places, in their order."""
        rows = np.arange(len(self)).reshape(-1, self.views_per_image)[list(places)]
        return self._rows(rows.ravel())

    def _rows(self, rows: Any) -> "ViewTable":
        return ViewTable(
            image_size=self.image_size,
            boxes=self.boxes[rows],
            flips=self.flips[rows],
            seeds=self.seeds[rows],
            views_per_image=self.views_per_image,
            photometric=None if self.photometric is None else self.photometric[rows],
        )

    def bytes_of(self, rows: NDArray[np.bool_]) -> tuple[bytes, ...]:
        """Return the bytes of every column at these rows."""
        return tuple(column[rows].tobytes() for column in self._columns())

    def digest(self) -> str:
        """Return a SHA-256 in hexadecimal of every row, in order."""
        head = [list(self.image_size), self.views_per_image, len(self)]
        # without colours the digest is what it was before there were any
        named = [] if self.photometric is None else ["photometric"]
        state = hashlib.sha256(canonical_json([*head, *named]).encode())
        for column in self._columns():
            state.update(column.tobytes())
        return state.hexdigest()

    def _columns(self) -> list[NDArray[Any]]:
        columns = [self.boxes, self.flips, self.seeds]
        return columns if self.photometric is None else [*columns, self.photometric]


def _factors(values: NDArray[Any], rows: int) -> NDArray[Any]:
    factors = np.ascontiguousarray(values, "<f4")
    if factors.shape != (rows, 4):
        raise StoreError(f"photometric must be ({rows}, 4), got {factors.shape}")
    if not np.isfinite(factors).all() or (factors[:, :3] < 0).any():
        raise StoreError("photometric factors must be finite numbers of at least 0 (hue aside)")
    return factors
