"""A sheet to look at: what each teacher's stored levels say of some images, beside the images.

Letters: N images, H W a target's grid or a view's pixels, C channels.
"""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from stages.data.dataset import Dataset
from stages.data.images import read_image
from stages.data.places import Place
from stages.data.view import Box, view_image
from store.errors import StoreError
from store.files import write_file
from store.reader import FeatureStore
from store.spec import LevelSpec, Target

_OUTLIERS = 2.0
"""Percentage of tokens at either end of a component that may leave its range of colours."""
_FLAT = 0.5
_COLOURS = 3
_DPI = 150
# inches
_CELL, _GAP, _GROUP_GAP, _MARGIN = 1.5, 0.04, 0.22, 0.06
_IDS, _HEAD, _TITLE = 0.26, 0.24, 0.56
_ID_LETTERS_PER_INCH = 16

View = UInt8[np.ndarray, "H W 3"]
Colours = Float[np.ndarray, "N H W 3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelPicture:
    """A target's tokens as colours in 0..1, which show a `share` of the tokens' variance.

    `cosine` is what the codec keeps of a token on average, None where floats are stored.
    """

    teacher: str
    target: Target
    codec: str
    cosine: float | None
    share: float
    colours: Colours

    @property
    def title(self) -> str:
        """What is written above it, in three lines."""
        height, width = self.target.grid
        kept = "" if self.cosine is None else f", cosine {self.cosine:.4f}"
        return (
            f"{self.target.level}, {height} x {width}\n{self.codec}{kept}\n"
            f"{self.share:.0%} of the variance"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """Turns tokens of C channels into red, green, blue: principal component 1, 2 and 3.

    A component's largest loading is positive, and its 2nd to 98th percentile over the tokens it was
    made from become 0 to 1. Where fewer than three components vary, the others are 0.5.
    """

    mean: Float[np.ndarray, " C"]
    axes: Float[np.ndarray, "C K"]
    low: Float[np.ndarray, " K"]
    spread: Float[np.ndarray, " K"]

    @classmethod
    def of(cls, tokens: Float[np.ndarray, "N H W C"]) -> "Palette":
        """Return the palette of these tokens."""
        flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
        mean = flat.mean(axis=0)
        flat -= mean
        variances, vectors = np.linalg.eigh(flat.T @ flat / len(flat))
        largest_first = [index for index in range(len(variances))[::-1][:_COLOURS]
                         if variances[index] > 1e-12 * variances.sum()]  # fmt: skip
        axes = vectors[:, largest_first]
        loadings = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)[0]
        axes = axes * np.sign(loadings)
        components = flat @ axes
        low, high = np.percentile(components, (_OUTLIERS, 100 - _OUTLIERS), axis=0)
        # where almost all tokens are equal, only the outliers have a range
        spread = np.where(high > low, high - low, np.ptp(components, axis=0))
        return cls(mean=mean, axes=axes, low=low, spread=spread)

    def paint(self, tokens: Float[np.ndarray, "N H W C"]) -> Colours:
        """Return each token's colour in 0..1."""
        components = (tokens.astype(np.float64) - self.mean) @ self.axes
        colours = np.full((*tokens.shape[:-1], _COLOURS), _FLAT)
        colours[..., : self.axes.shape[1]] = ((components - self.low) / self.spread).clip(0, 1)
        return colours

    def share(self, tokens: Float[np.ndarray, "N H W C"]) -> float:
        """Return how much of the tokens' variance the colours show, 1 where there is none."""
        flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
        total = float(flat.var(axis=0).sum())
        return float((flat @ self.axes).var(axis=0).sum()) / total if total > 0 else 1.0


def choose_images(store: FeatureStore, count: int) -> tuple[str, ...]:
    """Return up to `count` ids of images that every finished teacher has, spread by their hash.

    Raises:
        StoreError: no teacher is finished, or no image has features of all of them.
    """
    _refuse_empty(store)
    usable = np.logical_and.reduce([store.valid(name) for name in store.teachers])
    views = store.views.views_per_image
    ids = [name for name, good in zip(store.images.ids, usable[::views], strict=True) if good]
    if not ids:
        raise StoreError(f"no image of {store.path} has features of all its teachers")
    return tuple(sorted(ids, key=lambda name: sha256(name.encode()).digest())[:count])


def picture_levels(store: FeatureStore, ids: Sequence[str]) -> tuple[LevelPicture, ...]:
    """Colour every level of every finished teacher at every stored resolution, finest first.

    Raises:
        StoreError: no teacher is finished, an id is not in the store or its image is quarantined.
        StoreDamagedError: a checksum does not match.
    """
    _refuse_empty(store)
    rows = [store.row(name) for name in ids]
    return tuple(
        picture
        for name, spec in store.teachers.items()
        for level in spec.levels
        for picture in _picture_level(store, name, level, rows)
    )


def _picture_level(
    store: FeatureStore, teacher: str, level: LevelSpec, rows: Sequence[int]
) -> Iterator[LevelPicture]:
    """Colour a level at every resolution, all with the palette of the finest."""
    palette: Palette | None = None
    for target in level.targets:
        tokens = store.read(teacher, level.name, rows, target.grid)
        palette = palette or Palette.of(tokens)
        fitted = store.codec(teacher, level.name, target.grid)
        yield LevelPicture(
            teacher=teacher,
            target=target,
            codec=store.teachers[teacher].codec,
            cosine=None if fitted is None else fitted.fidelity.cosine_mean,
            share=palette.share(tokens),
            colours=palette.paint(tokens),
        )


def load_views(store: FeatureStore, dataset: Dataset, ids: Sequence[str]) -> dict[str, View]:
    """Return view 0, cut as the store says, of those images that the data set lists.

    Raises:
        StoreError: an image's content is not the one that the store was made from.
        ImageError: an image cannot be read.
    """
    listed = {source.id for source in dataset.images}
    return {name: _load_view(store, dataset.path(name), name) for name in ids if name in listed}


def _load_view(store: FeatureStore, path: Place, image_id: str) -> View:
    row = store.row(image_id)
    file = read_image(path)
    if file.sha256 != store.images.sha256[row // store.views.views_per_image]:
        raise StoreError(
            f"image {image_id!r} ({path}) is not the one that {store.path} was made from; name the "
            "parameter file of the store's own data, or leave --params out"
        )
    top, left, height, width = (round(float(side)) for side in store.views.boxes[row])
    box = Box(top=top, left=left, height=height, width=width)
    return view_image(file.pixels, box, store.views.image_size)


def save_feature_sheet(
    pictures: Sequence[LevelPicture],
    ids: Sequence[str],
    views: Mapping[str, View],
    image_size: tuple[int, int],
    path: Path,
) -> None:
    """Write a PNG: a row per image, a column per picture, the views first where there are any.

    Every cell has the aspect ratio of `image_size` (height, width); a token is a rectangle of one
    colour. The file appears whole or not at all.
    """
    columns: list[tuple[str, str, Sequence[View | None] | Colours]] = []
    if views:
        columns.append(("", "image", [views.get(name) for name in ids]))
    columns += [(picture.teacher, picture.title, picture.colours) for picture in pictures]
    height = _CELL * image_size[0] / image_size[1]
    lefts = _lefts([teacher for teacher, _, _ in columns])
    size = (lefts[-1] + _CELL + _MARGIN, _HEAD + _TITLE + (height + _GAP) * len(ids) + _MARGIN)
    figure = Figure(figsize=size, dpi=_DPI)

    def write(left: float, top: float, text: str, **style: Any) -> None:
        figure.text(left / size[0], 1 - top / size[1], text, **style)

    for row, name in enumerate(ids):
        middle = _HEAD + _TITLE + row * (height + _GAP) + height / 2
        text = textwrap.fill(name, max(8, int(height * _ID_LETTERS_PER_INCH)), max_lines=2)
        write(_IDS / 2, middle, text, size=6, rotation=90, ha="center", va="center")
    shown = None
    for left, (teacher, title, cells) in zip(lefts, columns, strict=True):
        if teacher != shown:
            shown = teacher
            write(left, _HEAD / 2 + 0.02, teacher, size=10, weight="bold", va="center")
        write(left, _HEAD + _TITLE - 0.05, title, size=7, va="bottom", linespacing=1.3)
        for row, cell in enumerate(cells):
            top = _HEAD + _TITLE + row * (height + _GAP)
            box = (left / size[0], 1 - (top + height) / size[1], _CELL / size[0], height / size[1])
            _fill(figure, box, cell)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())


def _lefts(teachers: Sequence[str]) -> list[float]:
    """Where columns begin, in inches: teachers lie further apart than the columns of one."""
    lefts = [_IDS]
    for before, teacher in pairwise(teachers):
        lefts.append(lefts[-1] + _CELL + (_GAP if teacher == before else _GROUP_GAP))
    return lefts


def _fill(figure: Figure, box: tuple[float, float, float, float], cell: Any) -> None:
    axes = figure.add_axes(box)
    axes.set_axis_off()
    if cell is None:
        axes.text(0.5, 0.5, "not in the data set", size=6, ha="center", va="center")
    else:
        axes.imshow(cell, interpolation="nearest", aspect="auto")


def _refuse_empty(store: FeatureStore) -> None:
    if not store.teachers:
        raise StoreError(f"{store.path} has no finished teacher; run `sak extract-teachers` first")
