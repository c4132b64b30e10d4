"""Reuse of stored grids: image and labels are mirrored or cut once more, and the grids alike.

That is an approximation, for a teacher would answer the changed image otherwise. How far off it is
lies measured in the store (`stages.extract.equivariance`), and a run that asks for more than that
is refused. Images and labels are cut from the file by the rules of all views; grids are resampled
here, after decoding, at the very same place.

Letters: `b` images, `h w` grid, `C` channels.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train.config import ReuseConfig
from stages.train.stream import Batch, StreamError
from stages.train.targets import TargetSource, TeacherTargets
from store.reader import FeatureStore

_NEEDS = {"flip": ("flip",), "crop": ("crop", "scale")}
"""Measured figures that each change relies on: a part shown larger is cut and enlarged."""


class ReuseError(StreamError):
    """Stored grids do not follow the changes asked for, as far as is known."""


def mirror(grid: Tensor, parts: Tensor) -> Tensor:
    """Return `b h w C`, mirrored left to right where the image is (`parts` are `b 5`); no rounding."""
    return torch.where(parts[:, 0].view(-1, 1, 1, 1) > 0, grid.flip(2), grid)


def regrid(grid: Tensor, parts: Tensor) -> Tensor:
    """Return `b h w C` float32 of a grid of the same shape: each image's part (`b 5`) fills it.

    Bilinear between the centres of cells, at the places where the student's image is resampled;
    the outer half of a cell at the rim is constant.
    """
    flip, top, left, height, width = parts.unbind(1)
    zero = torch.zeros_like(flip)
    across = torch.stack([width * (1 - 2 * flip), zero, 2 * left + width - 1], dim=1)
    down = torch.stack([zero, height, 2 * top + height - 1], dim=1)
    channels_first = grid.float().permute(0, 3, 1, 2)
    places = F.affine_grid(
        torch.stack([across, down], dim=1), list(channels_first.shape), align_corners=False
    )
    sampled = F.grid_sample(
        channels_first, places, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.permute(0, 2, 3, 1)


class ReusedTargets:
    """Changes what another source gives as the images of the batch were changed."""

    def __init__(self, source: TargetSource, reuse: ReuseConfig) -> None:
        self._source = source
        self._change = mirror if reuse.crop is None else regrid

    def __call__(self, batch: Batch) -> dict[str, TeacherTargets]:
        """Return the targets of a batch with `parts`."""
        assert batch.parts is not None
        return {
            name: self._changed(teacher, batch.parts)
            for name, teacher in self._source(batch).items()
        }

    def _changed(self, teacher: TeacherTargets, parts: Tensor) -> TeacherTargets:
        shown = parts if teacher.rows is None else parts.index_select(0, teacher.rows)
        return replace(teacher, levels=[self._change(level, shown) for level in teacher.levels])


def check_reuse(reuse: ReuseConfig, store: FeatureStore, teachers: Sequence[str]) -> None:
    """Refuse changes that a level of one of the teachers follows less well than is asked for.

    Raises:
        ReuseError: with the figures, or with the command that measures them.
    """
    asked = {
        change: least
        for change, least in (("flip", reuse.flip), ("crop", reuse.crop))
        if least is not None
    }
    low = [line for name in teachers if asked for line in _too_low(store, name, asked)]
    if low:
        listed = "\n  ".join(low)
        raise ReuseError(
            f"reuse: these levels do not follow the image as well as asked for:\n  {listed}\n"
            "Lower reuse.flip or reuse.crop below these cosines if you accept the error, leave "
            "the change or the teacher out, or have the teachers answer changed images: "
            "`views: {count: 4}` and another store"
        )


def _too_low(store: FeatureStore, teacher: str, asked: dict[str, float]) -> list[str]:
    measured = store.equivariance(teacher)
    if measured is None:
        raise ReuseError(
            f"reuse: how far teacher {teacher!r} follows flips and crops is not in {store.path}. "
            "To measure it, set extract.equivariance_images to 16 and run: "
            f"sak extract-teachers {teacher}"
        )
    return [
        f"{teacher}, {level}: {figure} {cosines[figure]:.3f}, reuse.{change} asks for {least:g}"
        for level, cosines in measured.cosine.items()
        for change, least in asked.items()
        for figure in _NEEDS[change]
        if not cosines[figure] >= least  # NaN: too small a grid to tell
    ]
