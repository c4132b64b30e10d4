"""Reading a published checkpoint: a file from outside that is trusted with nothing.

Refused: pickles that hold more than tensors and plain values, cut or repacked archives, tensors
that are not finite float32, and tensors whose shape claims more than the file holds.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MODEL = "model"
"""Entry of the published files that holds the weights."""
COUNTERS = "num_batches_tracked"


class ReferenceError(ValueError):
    """A file is no checkpoint of the reference code, or a student cannot become one."""


def read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights of a file, and the names of its other entries, such as `optimizer`.

    Takes what `torch.save` wrote (`{"model": weights, ...}` or the weights alone), or safetensors.
    Names keep the order of the file; all tensors are finite float32, counters int64.

    Raises:
        ReferenceError: no such file, unreadable, holding code, or holding unusable tensors.
    """
    if not path.is_file():
        raise ReferenceError(f"no file at {path}; give the checkpoint's path")
    loaded = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    if not isinstance(loaded, Mapping):
        raise ReferenceError(f"{path} holds a {type(loaded).__name__}, expected a mapping of names")
    wrapped = isinstance(loaded.get(MODEL), Mapping)
    weights = loaded[MODEL] if wrapped else loaded
    others = tuple(str(name) for name in loaded if name != MODEL) if wrapped else ()
    if not weights:
        raise ReferenceError(f"{path} holds no weights")
    if wrong := [line for name, value in weights.items() if (line := _fault(name, value))]:
        raise ReferenceError(f"{path} cannot be used:\n{listed(wrong)}")
    # a file may let names share memory, which safetensors does not
    return {name: value.clone() for name, value in weights.items()}, others


def listed(lines: list[str], most: int = 10) -> str:
    """Indent lines one below the other, the first ones only."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in [*lines[:most], *more])


def _load_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ReferenceError(f"{path} is no whole safetensors file ({error})") from error


def _load_pickle(path: Path) -> Any:
    if is_zipfile(path):
        _check_archive(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if "Weights only load failed" in reason:
            raise ReferenceError(
                f"{path} is refused: it is cut short, or holds objects or code beside tensors and "
                "plain values, which would run on loading; save a plain state dict"
            ) from error
        raise ReferenceError(f"{path} cannot be read as a checkpoint ({reason})") from error


def _check_archive(path: Path) -> None:
    """Compare the checksums, which torch does not, after looking for a packed bomb."""
    try:
        with ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                raise ReferenceError(f"{path} is a packed zip, which torch.save never writes")
            if wrong := archive.testzip():
                raise ReferenceError(f"{path} is damaged (checksum of {wrong}); fetch it again")
    except (BadZipFile, EOFError, NotImplementedError) as error:
        raise ReferenceError(f"{path} is damaged ({error}); fetch it again") from error


def _fault(name: object, value: object) -> str | None:
    """Say what is wrong with one entry, or return None."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return f"{name!r}: a {type(value).__name__}, expected a tensor"
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return f"{name}: not a dense tensor"
    expected = torch.int64 if name.endswith(COUNTERS) else torch.float32
    if value.dtype != expected:
        return f"{name}: {value.dtype}, expected {expected}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"{name}: shape {tuple(value.shape)} claims more than the file holds"
    if expected == torch.float32 and not value.isfinite().all():
        return f"{name}: holds NaN or infinity"
    return None
