"""Measures how far a teacher's grid follows its image when that is mirrored, cut or enlarged.

Whoever reuses a stored grid under a flip or a crop relies on it; no teacher does so exactly. Of a
few images the teacher is asked directly, and each token compared by its cosine:

* `flip`: the mirrored grid, with the answer to the mirrored view;
* `crop`: the overlap of two windows at one scale, apart by whole cells (a quarter of the window),
  in the answers to either: context changes, nothing is resampled;
* `scale`: the middle half of the grid, enlarged bilinearly as the training loss does, with the
  answer to the middle of the view, enlarged to the whole of it.

Windows are cut from a canvas, the view resized so that a cell of the coarsest grid is a whole
number of pixels, so windows end at cells. Grids that are no multiple of the coarsest are measured
on windows of their own.

Letters: `B` batch, `C` channels, `h w` cells of a grid.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from stages.data.view import Box, view_image, whole
from stages.extract.calibrate import sampling_order
from stages.extract.errors import NonFiniteFeaturesError
from stages.extract.reading import RowReader, read_ahead
from stages.extract.teachers import Teacher
from stages.progress import Progress
from store.equivariance import TABLE, TRANSFORMS, Equivariance, write_equivariance
from store.remote import StorePath
from store.spec import Grid

_Pixels = NDArray[np.uint8]
_AHEAD = 4


def keep_equivariance(
    store_path: StorePath, rows: RowReader, count: int, progress: Progress
) -> None:
    """Measure a teacher, and write the figures to its folder, where that has not happened yet.

    Only the teacher's writer may. Does nothing where no image is readable.

    Raises:
        ImageChangedError: an image is not the file that was indexed.
        NonFiniteFeaturesError: the teacher answered with NaN or infinity.
    """
    spec = rows.teacher.spec
    folder = store_path / spec.name
    chosen = choose_images(rows, count)
    if TABLE.exists(folder) or not chosen:
        return
    progress.start(f"equivariance {spec.name}", len(chosen))
    sums: dict[tuple[str, str], list[float]] = {}
    with closing(read_ahead(rows.pixels, chosen, rows.readers, _AHEAD)) as views:
        for row, pixels in zip(chosen, views, strict=True):
            for key, figure in measure_view(rows, pixels, rows.image_id(row)).items():
                sums.setdefault(key, []).append(figure)
            progress.advance()
    cosine = {
        level.name: {name: float(np.mean(sums[level.name, name])) for name in TRANSFORMS}
        for level in spec.levels
    }
    write_equivariance(folder, spec, Equivariance(images=len(chosen), cosine=cosine))


def choose_images(rows: RowReader, count: int) -> list[int]:
    """Return view 0 of at most `count` readable images, those whose ids hash lowest."""
    first = range(0, len(rows.views), rows.views.views_per_image)
    good = (row for row in first if rows.is_ok(row))
    return heapq.nsmallest(count, good, key=lambda row: sampling_order(rows.image_id(row), row))


def measure_view(rows: RowReader, pixels: _Pixels, image_id: str) -> dict[tuple[str, str], float]:
    """Return the mean cosine of each (level, transform) for the pixels (H, W, 3) of one view.

    Raises:
        NonFiniteFeaturesError: the teacher answered with NaN or infinity.
    """
    spec, size = rows.teacher.spec, rows.views.image_size
    found: dict[tuple[str, str], float] = {}
    for coarsest, names in nested_grids({level.name: level.grid for level in spec.levels}).items():
        windows = Windows.of(coarsest, size)
        answers = _ask(rows.teacher, windows.cut(pixels), names, image_id)
        for name, answer in answers.items():
            for transform, cosine in windows.compare(answer).items():
                found[name, transform] = cosine
    return found


def nested_grids(grids: Mapping[str, Grid]) -> dict[Grid, list[str]]:
    """Group levels by a grid that divides theirs, coarsest first."""
    groups: dict[Grid, list[str]] = {}
    for name, grid in sorted(grids.items(), key=lambda pair: pair[1]):
        nested = (one for one in groups if grid[0] % one[0] == 0 and grid[1] % one[1] == 0)
        groups.setdefault(next(nested, grid), []).append(name)
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The windows for a grid (h, w) whose cells have `cell` pixels (height, width).

    `shift` is how many cells the two windows of `crop` lie apart; `middle` the first cell of the
    enlarged part and `part` its extent, in cells.
    """

    grid: Grid
    cell: tuple[int, int]
    shift: Grid
    middle: Grid
    part: Grid

    @classmethod
    def of(cls, grid: Grid, image_size: tuple[int, int]) -> "Windows":
        """Return windows of about `image_size` pixels, apart by a quarter of their cells."""
        (rows, columns), (height, width) = grid, image_size
        part = max(1, rows // 2), max(1, columns // 2)
        return cls(
            grid=grid,
            cell=(max(1, round(height / rows)), max(1, round(width / columns))),
            shift=(min(rows - 1, -(-rows // 4)), min(columns - 1, -(-columns // 4))),
            middle=((rows - part[0]) // 2, (columns - part[1]) // 2),
            part=part,
        )

    def cut(self, pixels: _Pixels) -> list[_Pixels]:
        """Return the view, mirrored, enlarged in its middle, and the two windows of `crop`."""
        (rows, columns), (height, width) = self.grid, self.cell
        # the enlarged part has as many pixels as a window, so the canvas has more
        times = [-(-cells // part) for cells, part in zip(self.grid, self.part, strict=True)]
        view = _canvas(pixels, (rows * height * times[0], columns * width * times[1]))
        fine = height * times[0], width * times[1]
        wide = _canvas(pixels, ((rows + self.shift[0]) * height, (columns + self.shift[1]) * width))
        return [
            view,
            np.ascontiguousarray(view[:, ::-1]),
            _window(view, self.middle, self.part, fine),
            _window(wide, (0, 0), self.grid, self.cell),
            _window(wide, self.shift, self.grid, self.cell),
        ]

    def compare(self, answers: Tensor) -> dict[str, float]:
        """Return each transform's mean cosine from the answers (5, h, w, C) to `cut`.

        The grid is this one or a multiple of it. NaN where it has a single cell.
        """
        whole_view, mirrored, enlarged, first, second = answers
        rows, columns = whole_view.shape[:2]
        down, across = rows // self.grid[0], columns // self.grid[1]
        top, left = self.shift[0] * down, self.shift[1] * across
        begin = self.middle[0] * down, self.middle[1] * across
        part = whole_view[
            begin[0] : begin[0] + self.part[0] * down, begin[1] : begin[1] + self.part[1] * across
        ]
        grown = functional.interpolate(
            part.permute(2, 0, 1)[None], size=(rows, columns), mode="bilinear"
        )
        cosines = {
            "flip": _cosine(whole_view.flip(1), mirrored),
            "crop": _cosine(first[top:, left:], second[: rows - top, : columns - left]),
            "scale": _cosine(grown[0].permute(1, 2, 0), enlarged),
        }
        if self.grid == (1, 1):
            cosines |= {"crop": float("nan"), "scale": float("nan")}
        return cosines


def _ask(
    teacher: Teacher, windows: Sequence[_Pixels], names: Iterable[str], image_id: str
) -> dict[str, Tensor]:
    """Return the answers (B, h, w, C) to the windows, of each named level, in float64."""
    inputs = torch.stack([teacher.preprocess(window, whole(window)) for window in windows])
    levels = teacher(inputs).levels
    answers = {name: levels[name].detach().cpu().double() for name in names}
    for name, answer in answers.items():
        if not torch.isfinite(answer).all():
            raise NonFiniteFeaturesError(
                f"teacher {teacher.spec.name!r}, {name}: NaN or infinity for image {image_id!r} "
                "while measuring equivariance. fp16 overflows where bf16 and fp32 do not"
            )
    return answers


def _canvas(pixels: _Pixels, size: tuple[int, int]) -> _Pixels:
    return view_image(pixels, whole(pixels), size)


def _window(canvas: _Pixels, start: Grid, extent: Grid, cell: tuple[int, int]) -> _Pixels:
    (top, left), (height, width) = (
        (pair[0] * cell[0], pair[1] * cell[1]) for pair in (start, extent)
    )
    return view_image(canvas, Box(top=top, left=left, height=height, width=width), (height, width))


def _cosine(one: Tensor, other: Tensor) -> float:
    """Return the mean over tokens that both have a direction, 1 where none has."""
    directed = (one != 0).any(-1) & (other != 0).any(-1)
    if not directed.any():
        return 1.0
    cosines = functional.cosine_similarity(one[directed], other[directed], dim=-1)
    return float(cosines.mean().clamp(-1, 1))
