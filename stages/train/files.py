"""Writing files whole or not at all, and reading only those that are whole."""

import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from store.files import partial_path, sync_folder


class DamagedFileError(ValueError):
    """A file is not what `torch.save` wrote."""


def load_whole(path: Path) -> Any:
    """Return what `torch.save` wrote, on the CPU, after comparing the checksums in the file.

    Raises:
        DamagedFileError: it is no such file, is cut short, or a checksum does not match.
    """
    try:
        with ZipFile(path) as archive:  # torch writes checksums and does not look at them
            if wrong := archive.testzip():
                raise DamagedFileError(f"{path} is damaged (checksum of {wrong})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (BadZipFile, UnpicklingError, RuntimeError, EOFError) as error:
        raise DamagedFileError(f"{path} cannot be read, it is damaged") from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then put it in place.

    After a crash or a full disk the old file, if any, is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
