"""Views: the same part of an image and of its labels, mirrored or not, brought to one size.

What teachers and student see of an image is decided here alone: `cut_view` makes the pixels of a
view, `replay_label` does the same to labels. Both cut, then mirror; colours change before any
resizing, so that every teacher and the student resize the same pixels.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from stages.data.photometric import Photometric, change_colours

DepthRule = Literal["metric", "scaled"]
Resample = Literal["bilinear", "bicubic", "lanczos"]
_IGNORE = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle of whole source pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One version of an image: a part of it, mirrored left to right or not, colours kept or not."""

    box: Box
    flip: bool = False
    photometric: Photometric | None = None


def cut_view(image: npt.NDArray[np.uint8], view: View) -> npt.NDArray[np.uint8]:
    """Return the pixels of a view, h x w x 3 at the size of its box, from an H x W x 3 image.

    Raises:
        ValueError: the box does not lie inside the image.
    """
    pixels = _mirrored(_cut(image, view.box), view.flip)
    return pixels if view.photometric is None else change_colours(pixels, view.photometric)


def part_of(view: View, part: View) -> View:
    """Return the view of an image that shows the part `part` of what `view` shows, without colours.

    So labels follow an image that is cut twice: `cut_view(cut_view(image, view), part)`.
    """
    box, inner = view.box, part.box
    left = box.width - inner.left - inner.width if view.flip else inner.left
    return View(
        box=Box(
            top=box.top + inner.top,
            left=box.left + left,
            height=inner.height,
            width=inner.width,
        ),
        flip=view.flip != part.flip,
    )


def whole(array: npt.NDArray[Any]) -> Box:
    """Return the box of all pixels of an H x W [x C] array."""
    return Box(top=0, left=0, height=array.shape[0], width=array.shape[1])


def zoom(box: Box, height: int, width: int, image_size: tuple[int, int]) -> float:
    """Return how many times larger a part of an image of `height` x `width` shows than in view 0.

    Sides are compared by their geometric mean, for a box may be stretched to the view.
    """
    first = whole_image_box(height, width, image_size)
    return math.sqrt(first.height * first.width / (box.height * box.width))


def replay_label(
    task: str,
    label: npt.NDArray[Any],
    view: View,
    image_size: tuple[int, int],
    depth: DepthRule = "metric",
) -> npt.NDArray[Any]:
    """Bring an H x W [x 3] label to a view as `view_label` does, mirrored where the view is.

    Mirroring negates the x of normals. `depth` is `metric`, metres as they are, or `scaled`, divided
    by `zoom`: what shows larger is as near as it would be to the camera that took view 0.
    """
    cut = _mirrored(_cut(label, view.box), view.flip)
    if task == "normals" and view.flip:
        cut = np.concatenate([0 - cut[..., :1], cut[..., 1:]], axis=-1)  # 0 - x: no negative zeros
    shown = view_label(task, cut, whole(cut), image_size)
    if task == "depth" and depth == "scaled":
        height, width = label.shape[:2]
        return (shown / zoom(view.box, height, width, image_size)).astype(shown.dtype)
    return shown


def whole_image_box(height: int, width: int, image_size: tuple[int, int]) -> Box:
    """Return the largest centred box with the aspect ratio of `image_size` (height, width).

    One side equals the image's; the other is the exact value rounded to a pixel (at least 1).
    """
    rows, columns = image_size
    if height * columns >= width * rows:
        box_height, box_width = _scaled(width, rows, columns), width
    else:
        box_height, box_width = height, _scaled(height, columns, rows)
    return Box(
        top=(height - box_height) // 2,
        left=(width - box_width) // 2,
        height=box_height,
        width=box_width,
    )


def view_image(
    image: npt.NDArray[np.uint8],
    box: Box,
    image_size: tuple[int, int],
    resample: Resample = "bilinear",
) -> npt.NDArray[np.uint8]:
    """Cut `box` out of an H x W x 3 image and resize it, antialiased, to `image_size`.

    Pixels outside the box have no influence. A box of the target's size is only cut.
    """
    cut = _cut(image, box)
    rows, columns = image_size
    if (box.height, box.width) == image_size:
        return np.ascontiguousarray(cut)
    resized = Image.fromarray(cut).resize((columns, rows), Image.Resampling[resample.upper()])
    return np.array(resized)  # asarray would be read-only


def view_label(
    task: str, label: npt.NDArray[Any], box: Box, image_size: tuple[int, int]
) -> npt.NDArray[Any]:
    """Bring an H x W [x 3] label to the view; values are never mixed and keep their dtype.

    All tasks take the nearest pixel (depth stays in metres of the source camera), except
    boundaries on an axis that shrinks: there a pixel is boundary if any source pixel nearest to
    it is, since lines one pixel wide would otherwise tear.
    """
    cut = _cut(label, box)
    if task == "boundary":
        return _any_boundary(cut, image_size)
    rows, columns = (
        _nearest(source, target) for source, target in zip(cut.shape, image_size, strict=False)
    )
    return np.ascontiguousarray(cut[rows][:, columns])


def _scaled(side: int, numerator: int, denominator: int) -> int:
    """`side * numerator / denominator`, rounded half up, at least 1; exact in integers."""
    return max(1, (2 * side * numerator + denominator) // (2 * denominator))


def _cut(array: npt.NDArray[Any], box: Box) -> npt.NDArray[Any]:
    height, width = array.shape[:2]
    inside = 0 <= box.top <= height - box.height and 0 <= box.left <= width - box.width
    if not inside or box.height < 1 or box.width < 1:
        raise ValueError(f"{box} does not lie inside an image of {height} x {width} pixels")
    return array[box.top : box.top + box.height, box.left : box.left + box.width]


def _mirrored(array: npt.NDArray[Any], flip: bool) -> npt.NDArray[Any]:
    return array[:, ::-1] if flip else array


def _nearest(source: int, target: int) -> npt.NDArray[np.intp]:
    """Index of the source pixel under the centre of each of `target` pixels."""
    return (2 * np.arange(target) + 1) * source // (2 * target)


def _any_boundary(label: npt.NDArray[Any], image_size: tuple[int, int]) -> npt.NDArray[Any]:
    # order of precedence within a cell: boundary, then ignore, then nothing
    ranked = np.where(label == _IGNORE, 0.5, label)
    for axis, target in enumerate(image_size):
        source = ranked.shape[axis]
        if source < target:
            ranked = np.take(ranked, _nearest(source, target), axis)
        else:  # first source pixel whose centre lies in each target pixel
            starts = (2 * source * np.arange(target) + target - 1) // (2 * target)
            ranked = np.maximum.reduceat(ranked, starts, axis)
    return np.where(ranked == 0.5, _IGNORE, ranked).astype(label.dtype)
