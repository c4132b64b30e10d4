"""A new file that grows by appending and shows under its name only once it is placed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractBufferedFile
from upath import UPath

from store.files import partial_path, sync_folder, write_fully
from store.remote import StorePath, missing_bucket_refused, remote_errors

_FLUSHED_BYTES = 8 * 2**20
_PART_BYTES = 8 * 2**20  # at least 5 MiB for S3, whose 10,000 parts then make 80 GB


class LocalFile:
    """A file under a temporary name in the folder it will stay in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = partial_path(path)
        self._written = self._flushed = 0
        self._descriptor: int | None = os.open(
            self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666
        )

    def write(self, *parts: bytes | memoryview) -> None:
        """Append one after the other."""
        assert self._descriptor is not None
        write_fully(self._descriptor, *parts)
        self._written += sum(map(len, parts))
        if self._written - self._flushed >= _FLUSHED_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Have the system begin to bring to the disk what was written, while more is computed.

        Linux takes this advice so; `sync` then waits for little. Elsewhere it waits for all.
        """
        assert self._descriptor is not None
        if hasattr(os, "posix_fadvise"):
            length = self._written - self._flushed
            os.posix_fadvise(self._descriptor, self._flushed, length, os.POSIX_FADV_DONTNEED)
        self._flushed = self._written

    def sync(self) -> None:
        """Make durable what was written; nothing can be appended any more."""
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        self._close()

    def place(self) -> None:
        """Give the file its name."""
        self._partial.replace(self._path)
        sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove what was written; does nothing once placed."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Upload:
    """An upload in parts, of which memory holds one; completing it is what places the object."""

    def __init__(self, path: UPath) -> None:
        self._path = path
        self._file: Any = path.fs.open(path.path, "wb", block_size=_PART_BYTES)

    def __del__(self) -> None:
        # Losing one of fsspec's files to the collector would complete what is there.
        if isinstance(getattr(self, "_file", None), AbstractBufferedFile):
            self._file.closed = True

    def write(self, *parts: bytes | memoryview) -> None:
        """Append one after the other."""
        with self._refusals():
            for data in parts:
                self._file.write(data)

    def sync(self) -> None:
        """Do nothing: a completed upload is durable."""

    def place(self) -> None:
        """Complete the upload, which gives the object its name."""
        try:
            with self._refusals():
                self._file.close()
        except BaseException:
            self._abort()
            raise

    def discard(self) -> None:
        """Abort the upload; does nothing once placed."""
        if not self._file.closed:
            self._abort()

    def _abort(self) -> None:
        if isinstance(self._file, AbstractBufferedFile):
            self._file.closed = True  # closing would complete what is there
            with remote_errors(self._path):
                self._file.discard()
        else:  # memory: it has shown since it was opened
            self._file.close()
            self._path.unlink(missing_ok=True)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        with missing_bucket_refused(self._path), remote_errors(self._path):
            yield


def new_file(path: StorePath) -> LocalFile | Upload:
    """Return a file to be placed at `path`."""
    return LocalFile(path) if isinstance(path, Path) else Upload(path)
