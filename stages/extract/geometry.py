"""Where a view lands in a teacher's input, and which part of its grid belongs to the view.

Letters: `H W` pixels of the teacher's input, `h w` cells of a grid.
"""

from dataclasses import dataclass
from typing import Literal

InputSize = Literal["view", "native"] | tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFrame:
    """`size` is what the network sees, `content` its top-left part that the view fills.

    Both are (H, W) in pixels; the rest of `size`, right and below, is padding.
    """

    size: tuple[int, int]
    content: tuple[int, int]

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return how many rows and columns of the whole grid (h, w) lie on the view."""
        rows, columns = (
            whole * kept // full
            for whole, kept, full in zip(grid, self.content, self.size, strict=True)
        )
        return rows, columns


def plan_input(
    input_size: InputSize, view: tuple[int, int], native: tuple[int, int], multiple: int
) -> InputFrame:
    """Return how a view of `view` pixels enters a network that needs multiples of `multiple`.

    `"view"` and explicit sizes are filled by the view, at the nearest multiple. `"native"` keeps
    the aspect ratio (to the nearest multiple, so that no cell is half padding) and pads right and
    below up to the model's own size.
    """
    if input_size == "native":
        size = _nearest_multiple(native, multiple)
        return InputFrame(size=size, content=_inscribed(view, size, multiple))
    size = _nearest_multiple(view if input_size == "view" else input_size, multiple)
    return InputFrame(size=size, content=size)


def _nearest_multiple(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Round each side half up, never to zero."""
    height, width = (max(1, (2 * side + multiple) // (2 * multiple)) * multiple for side in size)
    return height, width


def _inscribed(view: tuple[int, int], size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The largest multiple of the view's shape within `size`; one side is filled exactly."""
    (rows, columns), (height, width) = view, size
    if rows * width >= columns * height:
        return height, _nearest_multiple((1, round(columns * height / rows)), multiple)[1]
    return _nearest_multiple((round(rows * width / columns), 1), multiple)[0], width
