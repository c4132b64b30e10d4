"""What every teacher must do, each point tried on one teacher at one size of views.

A check returns what it saw, or raises CheckFailedError with what is wrong.
Letters: `B h w C` as in `stages.extract.teachers.Features`.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stages.data.view import Box, whole_image_box
from stages.extract.errors import ExtractionError
from stages.extract.markers import MarkersFound, find_markers
from stages.extract.teachers import Features, Teacher
from store.spec import TeacherSpec, canonical_json

_IMAGES = 3
_SECONDS = 0.5
_MISSED_DEEP = 2
"""Markers of four that a level behind the first may miss: deep levels look at whole images."""
_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


class CheckFailedError(ExtractionError):
    """A teacher does not do what extraction needs."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A teacher, the size of its views (height, width) and the pictures that it is tried on."""

    teacher: Teacher
    view: tuple[int, int]

    @cached_property
    def pictures(self) -> list[NDArray[np.uint8]]:
        """Smooth pictures of several sizes, none of them that of the view."""
        generator = np.random.default_rng(0)
        height, width = self.view
        pictures = []
        for number in range(_IMAGES):
            coarse = generator.integers(0, 256, (6, 8, 3), np.uint8)
            wide, high = width + 24 * number, height + 40 + 8 * number
            pictures.append(np.array(Image.fromarray(coarse).resize((wide, high))))
        return pictures

    @cached_property
    def inputs(self) -> Tensor:
        """The pictures as the teacher prepares them."""
        return torch.stack([self.prepare(picture) for picture in self.pictures])

    @cached_property
    def features(self) -> Features:
        """What the teacher says of all of them."""
        return self.teacher(self.inputs)

    @property
    def tolerance(self) -> float:
        """Largest relative L2 by which answers that should agree may differ."""
        return _TOLERANCE[str(self.teacher.spec.provenance.get("precision", "fp32"))]

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        """Return the teacher's input for a whole picture."""
        height, width = picture.shape[:2]
        return self.teacher.preprocess(picture, whole_image_box(height, width, self.view))


def answers_as_promised(subject: Subject) -> str:
    """Levels and shapes are those of the spec for batches of any size, finite and float32."""
    spec = subject.teacher.spec
    for count in (1, _IMAGES):
        features = subject.teacher(subject.inputs[:count])
        promised: dict[str, tuple[int, ...]] = {
            level.name: (count, *level.grid, level.channels) for level in spec.levels
        }
        if spec.global_channels is not None:
            promised["pooled"] = (count, spec.global_channels)
        given = _parts(features)
        shapes = {name: tuple(values.shape) for name, values in given.items()}
        _require(shapes == promised, f"promised {promised}, {count} images gave {shapes}")
        for name, values in given.items():
            _require(values.dtype == torch.float32, f"{name} is {values.dtype}, not float32")
            _require(bool(values.isfinite().all()), f"{name} holds NaN or infinity")
    return ", ".join(
        f"{level.name} {level.grid[0]} x {level.grid[1]} x {level.channels}"
        for level in spec.levels
    )


def has_no_gradients(subject: Subject) -> str:
    """Nothing is kept for a backward pass."""
    kept = [name for name, values in _parts(subject.features).items() if values.requires_grad]
    _require(not kept, f"{', '.join(kept)} keep gradients: memory would grow")
    return "none kept"


def repeats_itself(subject: Subject) -> str:
    """The same batch gives the same bits."""
    again = _parts(subject.teacher(subject.inputs))
    for name, values in _parts(subject.features).items():
        _require(
            torch.equal(values, again[name]),
            f"{name} differs from one call to the next: dropout, or batch norm in training mode?",
        )
    return "the same bits"


def ignores_its_neighbours(subject: Subject) -> str:
    """An image's answer does not depend on the batch that it is in, nor on its place there."""
    together = _parts(subject.features)
    turned = _parts(subject.teacher(subject.inputs.flip(0)))
    alone = [_parts(subject.teacher(subject.inputs[index : index + 1])) for index in range(_IMAGES)]
    worst = 0.0
    for name, values in together.items():
        other = torch.cat([one[name] for one in alone])
        worst = max(worst, _relative(turned[name].flip(0), values), _relative(other, values))
    _require(
        worst <= subject.tolerance,
        f"answers alone and in batches differ by {worst:.2g} (relative L2), allowed is "
        f"{subject.tolerance:g}: statistics over the batch?",
    )
    return f"relative L2 {worst:.1g}"


def prepares_pixels_only(subject: Subject) -> str:
    """The input follows from the pixels in the box and from nothing else, and they stay as is."""
    picture = subject.pictures[0]
    height, width = picture.shape[:2]
    box = whole_image_box(height, width, subject.view)
    before, first = picture.copy(), subject.teacher.preprocess(picture, box)
    _require(np.array_equal(before, picture), "preprocess writes into the image that it is given")
    _require(
        torch.equal(first, subject.teacher.preprocess(picture, box)),
        "preprocess gives other pixels for the same image: random augmentation?",
    )
    framed = np.full((height + 6, width + 10, 3), 255, np.uint8)
    framed[2 : 2 + height, 5 : 5 + width] = picture
    moved = Box(top=box.top + 2, left=box.left + 5, height=box.height, width=box.width)
    _require(
        torch.equal(first, subject.teacher.preprocess(framed, moved)),
        "pixels outside the box change the input",
    )
    shapes = {(tuple(one.shape), one.dtype) for one in map(subject.prepare, subject.pictures)}
    _require(len(shapes) == 1, f"inputs of several shapes or dtypes cannot be stacked: {shapes}")
    return f"{first.dtype} {tuple(first.shape)}".removeprefix("torch.")


def sees_markers_in_place(subject: Subject) -> str:
    """A white square changes the cells that lie on it, in mirrored images too."""
    found: list[MarkersFound] = []
    for flipped in (False, True):
        found += find_markers(subject.teacher, subject.view, flipped=flipped)
    first = found[0].level
    for one in found:
        allowed = 0 if one.level == first else _MISSED_DEEP
        _require(
            one.missed <= allowed,
            f"{one.level} shows {one.missed} of 4 markers more than a cell away from their places, "
            f"the worst {one.distance} cells: is its grid turned, mirrored, or partly padding?",
        )
    shifts = [(abs(down), abs(right)) for down, right in (one.offset for one in found)]
    return f"within a cell; mean shift {max(map(max, shifts)):.2f} cells at most"


def keeps_the_aspect(subject: Subject) -> str:
    """Cells are square in the view, up to rounding to whole cells."""
    height, width = subject.view
    for level in subject.teacher.spec.levels:
        rows, columns = level.grid
        exact = rows * width / columns
        _require(
            abs(exact - height) <= height / rows,
            f"{level.name} has {rows} x {columns} cells for views of {height} x {width}",
        )
    return f"{height} x {width}"


def describes_itself(subject: Subject) -> str:
    """The description survives JSON, and says what weights and preprocessing were used."""
    spec = subject.teacher.spec
    text = canonical_json(spec.to_attributes())
    _require(TeacherSpec.from_attributes(json.loads(text)) == spec, "spec changes through JSON")
    needed = {"source", "weights_sha256", "probe_sha256", "precision"} - spec.provenance.keys()
    _require(not needed, f"the provenance lacks {', '.join(sorted(needed))}")
    return f"fingerprint {spec.fingerprint()[:16]}"


def keeps_a_pace(subject: Subject) -> str:
    """Say how fast it is; nothing is too slow."""
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < _SECONDS:
        for values in subject.teacher(subject.inputs).levels.values():
            values.cpu()  # waits for the device
        count += _IMAGES
    return f"{count / (time.perf_counter() - started):.1f} images/s, {_IMAGES} at a time"


CHECKS: Mapping[str, Callable[[Subject], str]] = {
    "levels": answers_as_promised,
    "gradients": has_no_gradients,
    "deterministic": repeats_itself,
    "batch": ignores_its_neighbours,
    "preprocess": prepares_pixels_only,
    "aspect": keeps_the_aspect,
    "markers": sees_markers_in_place,
    "description": describes_itself,
    "speed": keeps_a_pace,
}
"""In the order in which they are made."""


def _parts(features: Features) -> dict[str, Tensor]:
    pooled = {} if features.pooled is None else {"pooled": features.pooled}
    return {**features.levels, **pooled}


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise CheckFailedError(message)
