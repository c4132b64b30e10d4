"""Weights files: reading them, saying what does not fit, and a digest of what is in use."""

import hashlib
import pickle
import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path

import safetensors
import timm.models
import torch
from huggingface_hub import constants
from torch import Tensor

from stages.extract.errors import MissingWeightsError, WrongCheckpointError

# Found by corrupting files of each format: torch's unpickler does not wrap what it trips over.
READ_ERRORS = (
    safetensors.SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
"""What the libraries raise on a file that is damaged or belongs to another network."""

_SHOWN = 6


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or else of one that torch.load can read.

    Wrappers are removed: the usual keys around a state dict (an averaged model is preferred), and
    the prefixes of parallel and compiled modules.

    Raises:
        MissingWeightsError: no such file.
        WrongCheckpointError: the file is damaged, or holds more than tensors.
    """
    check_file(path)
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except READ_ERRORS as error:
        raise WrongCheckpointError(
            f"{path} cannot be read as weights ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); expected a .safetensors file or one that "
            "torch.load(weights_only=True) reads"
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WrongCheckpointError(
            f"{path} holds no plain dictionary of tensors; save the model's state_dict()"
        )
    return state


def check_file(path: Path) -> None:
    """Raise MissingWeightsError unless `path` is a file."""
    if not path.is_file():
        raise MissingWeightsError(
            f"there is no weights file at {path.absolute()}; copy it there, or correct the "
            "teacher's `checkpoint:`"
        )


def no_download(source: str, wanted: str, error: Exception) -> MissingWeightsError:
    """Return the error for weights that are neither cached nor to be had from the network."""
    return MissingWeightsError(
        f"the weights of {source} are not on this machine and could not be downloaded.\n"
        f"  wanted: {wanted}\n"
        f"  reason: {' '.join(str(error).split())[:300] or type(error).__name__}\n"
        f"Run once on a machine with internet (the file is kept in {constants.HF_HUB_CACHE}, which may be "
        "copied), or fetch that file by other means and set `checkpoint:` of this teacher to its "
        "path."
    )


def hub_file(repository: str, filename: str) -> str:
    """Name a file on the Hugging Face hub as a person finds it."""
    return f"{filename} of https://huggingface.co/{repository}"


def does_not_fit(
    source: str,
    origin: str,
    loaded: Collection[str],
    known: Collection[str],
    needed: Collection[str],
    error: Exception,
) -> WrongCheckpointError:
    """Return the error for weights that the library refused, with what is missing or too much.

    `loaded` are the file's names, `known` those of the whole model, `needed` those of the layers
    in use; shapes are taken from the library's message.
    """
    shapes = re.findall(r"size mismatch for (\S+): .*?\[(.*?)\].*?\[(.*?)\]", str(error))
    groups = {
        "missing": sorted(set(needed) - set(loaded)),
        "unexpected": sorted(set(loaded) - set(known)),
        "of another shape": [f"{key} ({got} for {want})" for key, got, want in shapes],
    }
    lines = [f"\n  {len(keys)} {what}: {_listed(keys)}" for what, keys in groups.items() if keys]
    details = "".join(lines) or f"\n  {' '.join(str(error).split())[:600]}"
    return WrongCheckpointError(
        f"{origin} does not fit {source}:{details}\n"
        "Check that the teacher's `source:` and `model_args:` name the network that was saved; a "
        "transformer trained at a size that is not square needs `img_size:` among the latter."
    )


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 in hexadecimal over name, shape, dtype and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
