"""Reading the labels of one image in the published multi-task layout.

Each file is checked against its image's size and against the values the layout allows, so that a
wrong export is an error that names the file, and not a student that learns nonsense.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from stages.data.tasks import IGNORE, Task

MAX_DEPTH = 80.0
"""Metres; anything beyond is taken for another unit."""
_READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class LabelError(ValueError):
    """A label is missing, unreadable, of another size, or holds values it must not hold."""


class _WrongValuesError(ValueError):
    """What a label array should have held and what it holds instead."""


def label_path(root: Path, task: str, image_id: str) -> Path:
    """Return where the layout keeps the label of one image for one task."""
    place = _PLACES[task]
    return root / place.folder / f"{image_id}{place.suffix}"


def read_labels(
    root: Path, tasks: Sequence[Task], image_id: str, size: tuple[int, int]
) -> dict[str, npt.NDArray[Any]]:
    """Read the labels of an image of `size` (height, width), one array per task at that size.

    segmentation int64 H x W classes, 255 ignore; parts int64 H x W 0..6, 255 ignore; saliency
    int64 H x W {0, 1}; normals float32 H x W x 3 unit vectors, zero where unknown; boundary
    float32 H x W {0, 1}; depth float32 H x W metres, 0 where unknown.

    Raises:
        LabelError: a file is missing, unreadable, of another size, or has forbidden values.
    """
    return {task.name: _read_label(root, task, image_id, size) for task in tasks}


def label_mistakes(
    root: Path, tasks: Sequence[Task], image_id: str, size: tuple[int, int] | None
) -> list[str]:
    """Say which labels of an image are missing or, where `size` is known, of another size.

    Only headers are read; values are checked when a label is.
    """
    mistakes = []
    for task in tasks:
        path = label_path(root, task.name, image_id)
        try:
            found = _stored_size(path)
            if size is not None:
                _check_size(path, found, size)
        except LabelError as error:
            mistakes.append(str(error))
    return mistakes


def _read_label(root: Path, task: Task, image_id: str, size: tuple[int, int]) -> npt.NDArray[Any]:
    path = label_path(root, task.name, image_id)
    raw = _stored_array(path)
    _check_size(path, raw.shape[:2], size)
    try:
        return _PLACES[task.name].decode(raw, task.channels)
    except _WrongValuesError as error:
        raise LabelError(f"{path}: {error}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise LabelError(f"{path} is missing") from error
    except _READ_ERRORS as error:
        raise LabelError(f"{path} cannot be read: {error}") from error


def _stored_array(path: Path) -> npt.NDArray[Any]:
    with _reading(path):
        if path.suffix == ".npy":
            return np.array(np.lib.format.open_memmap(path, mode="r"))
        with Image.open(path) as image:
            return np.asarray(image)


def _stored_size(path: Path) -> tuple[int, ...]:
    with _reading(path):
        if path.suffix == ".npy":  # mapping also notices a file that is too short
            return np.lib.format.open_memmap(path, mode="r").shape[:2]
        with Image.open(path) as image:
            return image.height, image.width


def _check_size(path: Path, found: tuple[int, ...], size: tuple[int, int]) -> None:
    if found != size:
        got = " x ".join(map(str, found))
        raise LabelError(f"{path} is {got} (height x width), its image is {size[0]} x {size[1]}")


def _classes_from_one(raw: npt.NDArray[Any], classes: int) -> npt.NDArray[np.int64]:
    """0 ignore, 1..classes on disk -> 255 ignore, 0..classes-1."""
    _require_integers(raw)
    if raw.max() > classes:
        raise _WrongValuesError(
            f"expected 0 (ignore) and classes 1..{classes}, got values up to {raw.max()}"
        )
    return np.where(raw == 0, IGNORE, raw.astype(np.int64) - 1)


def _classes(raw: npt.NDArray[Any], classes: int) -> npt.NDArray[np.int64]:
    _require_integers(raw)
    known = raw[raw != IGNORE]
    if known.size and known.max() >= classes:
        raise _WrongValuesError(
            f"expected classes 0..{classes - 1} and {IGNORE} (ignore), got {known.max()}"
        )
    return raw.astype(np.int64)


def _mask(raw: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    _require_integers(raw)
    if raw.dtype != np.bool_ and not np.isin(raw, (0, 255)).all():
        raise _WrongValuesError(f"expected only 0 and 255, got {_some_values(raw)}")
    return raw.astype(np.bool_)


def _saliency(raw: npt.NDArray[Any], _channels: int) -> npt.NDArray[np.int64]:
    return _mask(raw).astype(np.int64)


def _boundary(raw: npt.NDArray[Any], _channels: int) -> npt.NDArray[np.float32]:
    return _mask(raw).astype(np.float32)


def _normals(raw: npt.NDArray[Any], _channels: int) -> npt.NDArray[np.float32]:
    """(n + 1) / 2 * 255 on disk; what is far from unit length (grey, black, white) is unknown."""
    if raw.dtype != np.uint8 or raw.ndim != 3 or raw.shape[2] != 3:
        raise _WrongValuesError(f"expected an 8-bit RGB image, got {_describe(raw)}")
    vectors = raw.astype(np.float32) / 127.5 - 1
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    known = (lengths > 0.5) & (lengths < 1.5)
    unit = np.zeros_like(vectors)
    np.divide(vectors, lengths, out=unit, where=known)
    return unit


def _depth(raw: npt.NDArray[Any], _channels: int) -> npt.NDArray[np.float32]:
    if raw.dtype.kind != "f" or raw.ndim != 2:
        raise _WrongValuesError(f"expected height x width floats in metres, got {_describe(raw)}")
    if not np.isfinite(raw).all():
        count = np.count_nonzero(~np.isfinite(raw))
        raise _WrongValuesError(f"{count} values are not finite; unknown depth is written as 0")
    if raw.min() < 0 or raw.max() > MAX_DEPTH:
        raise _WrongValuesError(
            f"expected metres from 0 (unknown) to {MAX_DEPTH:g},"
            f" got {raw.min():g} to {raw.max():g}; is it another unit?"
        )
    return raw.astype(np.float32)


def _require_integers(raw: npt.NDArray[Any]) -> None:
    if raw.ndim != 2 or raw.dtype.kind not in "bui":
        raise _WrongValuesError(f"expected one integer per pixel, got {_describe(raw)}")


def _describe(raw: npt.NDArray[Any]) -> str:
    return f"{raw.dtype} of shape {raw.shape}"


def _some_values(raw: npt.NDArray[Any]) -> str:
    values = np.unique(raw)
    return ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the layout keeps a task's labels, and what turns a stored array into a label."""

    folder: str
    suffix: str
    decode: Callable[[npt.NDArray[Any], int], npt.NDArray[Any]]


_PLACES = {
    "segmentation": _Place(folder="segmentation", suffix=".png", decode=_classes_from_one),
    "parts": _Place(folder="parts", suffix=".png", decode=_classes),
    "saliency": _Place(folder="saliency", suffix=".png", decode=_saliency),
    "normals": _Place(folder="normals", suffix=".png", decode=_normals),
    "boundary": _Place(folder="edge", suffix=".png", decode=_boundary),
    "depth": _Place(folder="depth", suffix=".npy", decode=_depth),
}
