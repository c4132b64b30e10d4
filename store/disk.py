"""How fast the store's disk takes and gives bytes, and how much room it has."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from store.errors import StoreError
from store.files import write_fully
from store.remote import StorePath

RESERVE_BYTES = 64 * 2**20
"""Left free on the store's disk, for its small files and for whatever else writes there."""

_BLOCK = 8 * 2**20
_LEAST_SECONDS = 1e-6  # a clock too coarse must not divide by zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Free bytes for this user; bytes per second of one file, written until durable, read cold."""

    free_bytes: int
    write_rate: float
    read_rate: float


def measure_disk(path: Path, size: int) -> Disk:
    """Write a temporary file of about `size` bytes beside `path`, and read it back.

    The nearest folder above it that exists is taken. At most a tenth of the free space is used, and the
    file is removed. It holds noise, so that no file system makes it smaller; it is read after
    asking the system to forget it, which some file systems (in memory, in a network) do not do.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = existing_parent(path)
    free = shutil.disk_usage(folder).free
    block = os.urandom(max(1, min(_BLOCK, size, free // 10)))
    blocks = max(1, min(size, free // 10) // len(block))
    with tempfile.TemporaryFile(prefix=".sak-plan-", dir=folder) as file:
        descriptor = file.fileno()
        started = time.perf_counter()
        for _ in range(blocks):
            write_fully(descriptor, block)
        os.fsync(descriptor)
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):  # not on macOS, which then reads from memory
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        for index in range(blocks):
            os.pread(descriptor, len(block), index * len(block))
        read = time.perf_counter()
    total = blocks * len(block)
    return Disk(
        free_bytes=free,
        write_rate=total / max(written - started, _LEAST_SECONDS),
        read_rate=total / max(read - begun, _LEAST_SECONDS),
    )


def refuse_full_disk(
    folder: StorePath, needed: int, state: Callable[[], str], others: int = 0
) -> None:
    """Refuse to begin what will not fit: `needed` bytes, and a reserve, below a local folder.

    `others` are bytes that will be written meanwhile, of shards that are begun.

    Raises:
        StoreError: less than that is free; says what is safe (`state`).
    """
    if not isinstance(folder, Path):
        return
    free = shutil.disk_usage(folder).free
    if free < needed + others + RESERVE_BYTES:
        meanwhile = f", shards that are being written {others / 2**20:,.1f} MiB" if others else ""
        raise StoreError(
            f"no space left for the next shard of {folder}: it needs {needed / 2**20:,.1f} MiB"
            f"{meanwhile}, and {RESERVE_BYTES / 2**20:,.0f} MiB are kept free; {free / 2**20:,.1f} MiB are free "
            f"on the disk. {state()}. Make room and run the same command again, it resumes."
        )


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path that exists."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def bytes_there(store: Path, teachers: Sequence[str]) -> int:
    """Return the bytes of all files that a store holds of these teachers, finished or not."""
    files = (path for name in teachers for path in (store / name).rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)
