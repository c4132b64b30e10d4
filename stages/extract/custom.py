"""Teachers of the user's own: what their class must be, and how it becomes a network.

Letters: `B` batch, `C` channels, `H W` pixels, `h w` cells of a level's grid.
"""

import hashlib
import inspect
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stages.extract import checkpoints
from stages.extract.entry_points import find_entry, load_class, package_of
from stages.extract.errors import TeacherError
from stages.extract.network import Network, Outline, Tapped

_SEED = 0
_NEEDED = ("reductions", "native_size", "mean", "std", "interpolation")


@runtime_checkable
class CustomTeacher(Protocol):
    """What a class named by `source: custom:...` looks like; it needs nothing of ours but this.

    It is a `torch.nn.Module`, made as `MyTeacher(size, **model_args)`, where `size` is the (H, W)
    in pixels of every input. With its weights: those of the teacher's `checkpoint:` are loaded
    into it where that is set. Resizing, letterboxing, normalising, precision and batching are ours.

    A class attribute `version` (text) is to change whenever the same weights give other features;
    without it, the source of the class's module stands for it. `licence` (text) is kept as well.
    """

    reductions: Sequence[int]
    """Input pixels per grid cell of each map that `forward` returns; all one number where they
    have the same grid (blocks of a transformer). Inputs are multiples of the largest."""
    native_size: tuple[int, int]
    """(H, W) in pixels that the weights were trained at; what `input_size: native` means."""
    mean: tuple[float, float, float]
    """Subtracted from pixels scaled to 0..1, RGB."""
    std: tuple[float, float, float]
    """Divided by after that."""
    interpolation: str
    """How images are resized: bilinear, bicubic or lanczos."""

    def forward(self, images: Tensor) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return maps B C h w, one per reduction and in their order, and a pooled B C or None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomSource:
    """`custom:<name>`, an entry point of the group `sak.teachers`, or `custom:<module>:<Class>`."""

    name: str
    checkpoint: Path | Literal["random"] | None
    model_args: Mapping[str, Any]

    def outline(self) -> Outline:
        """Describe the network from the attributes of its class."""
        found = self._class()
        lacking = [name for name in _NEEDED if not hasattr(found, name)]
        if lacking:
            raise TeacherError(
                f"{self._label}: {found.__qualname__} lacks the class attributes "
                f"{', '.join(lacking)}; stages.extract.custom.CustomTeacher says what each is"
            )
        return Outline(
            reductions=tuple(found.reductions),
            native=tuple(found.native_size),
            mean=_triple(found.mean),
            std=_triple(found.std),
            interpolation=found.interpolation,
            facts={
                "library": package_of(found.__module__),
                "model": f"{found.__module__}:{found.__qualname__}",
                "tag": None,
                "licence": getattr(found, "licence", None),
                "custom_code": _code(found, self._label),
            },
        )

    def load(self, size: tuple[int, int], taps: tuple[int, ...]) -> Network:
        """Make the module for `size` (H, W) and load its checkpoint, where one is set."""
        found = self._class()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            try:
                module = found(size, **self.model_args)
            except Exception as error:
                raise _blame(
                    f"{self._label}: making {found.__qualname__} for {size}", error
                ) from error
        if not isinstance(module, nn.Module):
            raise TeacherError(f"{self._label}: expected a torch.nn.Module, got {type(module)}")
        weights = "random weights" if self.checkpoint == "random" else "those of its class"
        if isinstance(self.checkpoint, Path):
            self._read(module, self.checkpoint)
            weights = self.checkpoint.name
        tap = partial(_tap, module, self._label, len(found.reductions), taps)
        return Network(module=module, tap=tap, weights=weights, reentrant=False)

    @property
    def _label(self) -> str:
        return f"custom:{self.name}"

    def _class(self) -> Any:
        found = load_class(find_entry(self.name))
        if not isinstance(found, type):
            raise TeacherError(f"{self._label} names {found!r:.80}; expected a class")
        return found

    def _read(self, module: nn.Module, path: Path) -> None:
        state, known = checkpoints.read_state(path), set(module.state_dict())
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise checkpoints.does_not_fit(
                self._label, str(path), set(state), known, known, error
            ) from error


def _tap(
    module: nn.Module, label: str, count: int, taps: tuple[int, ...], images: Tensor
) -> Tapped:
    """Return the tapped maps of all that a module gives, and its pooled output."""
    try:
        answer = module(images)
    except RuntimeError:  # torch's own: sizes that do not fit, memory; understood by the caller
        raise
    except Exception as error:
        raise _blame(f"{label}: forward of images {tuple(images.shape)}", error) from error
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise TeacherError(
            f"{label}: forward must return (maps, pooled), got {type(answer).__name__}"
        )
    maps, pooled = answer
    if not isinstance(maps, list | tuple) or not all(isinstance(one, Tensor) for one in maps):
        raise TeacherError(f"{label}: the maps must be a list of tensors, got {maps!r:.80}")
    if len(maps) != count or any(one.ndim != 4 for one in maps):
        shapes = [tuple(one.shape) for one in maps]
        raise TeacherError(
            f"{label}: forward must return a map B C h w for each of the class's {count} "
            f"reductions, got shapes {shapes}"
        )
    return [maps[index] for index in taps], pooled


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _blame(doing: str, error: Exception) -> TeacherError:
    """Return an error that says where in the user's code another one was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}, line {frame.lineno}"
    return TeacherError(f"{doing} raised {type(error).__name__}: {error} ({where})")


def _code(found: Any, label: str) -> str:
    """Return the class's version, or else the SHA-256 in hexadecimal of its module's source."""
    declared = getattr(found, "version", None)
    if isinstance(declared, str):
        return declared
    try:
        source = inspect.getsource(sys.modules[found.__module__])
    except OSError as error:
        raise TeacherError(
            f"{label}: the source of {found.__module__} cannot be read; give the class a `version`"
        ) from error
    return hashlib.sha256(source.encode()).hexdigest()
