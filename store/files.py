"""Files that are either whole or not there, and who may write them."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from store.errors import StoreError, StoreLockedError
from store.lease import Lease
from store.remote import StorePath, missing_bucket_refused

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # disk, quota, file-size limit
_PARTIAL = ".partial"
_VECTOR = 512  # buffers in one call; every system takes at least twice as many


def partial_path(path: Path) -> Path:
    """Return the temporary name of a file: the same folder, hidden."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def ready_path(path: StorePath) -> StorePath:
    """Return where a store's next root and tables wait, complete, to be moved in.

    Beside the store; below it on object storage, where it may be a whole bucket.
    """
    return path.with_name(f".{path.name}.ready") if isinstance(path, Path) else path / ".ready"


def partials(folder: StorePath) -> list[Path]:
    """Return the temporary files that a killed writer left below a folder.

    On object storage there are none: what was not completed shows nowhere. Its parts still cost
    money, so give the bucket the usual lifecycle rule (AbortIncompleteMultipartUpload).
    """
    return sorted(folder.rglob(f".*{_PARTIAL}")) if isinstance(folder, Path) else []


def remove_partials(folder: StorePath) -> None:
    """Remove the temporary files that a killed writer left; only the folder's owner may."""
    for path in partials(folder):
        path.unlink()


def write_fully(descriptor: int, *parts: bytes | memoryview) -> None:
    """Write all of `parts`, one after the other, however many calls it takes."""
    views = [memoryview(part) for part in parts]
    while views:
        written = os.writev(descriptor, views[:_VECTOR])
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views:
            views[0] = views[0][written:]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: StorePath) -> None:
    """Make a folder below one that exists; object storage has none to make."""
    if isinstance(folder, Path):
        folder.mkdir(exist_ok=True)


def names_below(folder: StorePath) -> list[str]:
    """Return the name of every file below a folder, relative to it, hidden ones too."""
    if isinstance(folder, Path):
        paths = (path for path in folder.rglob("*") if path.is_file())
        return [path.relative_to(folder).as_posix() for path in paths]
    return [name.removeprefix(folder.path).lstrip("/") for name in folder.fs.find(folder.path)]


def remove_tree(folder: StorePath) -> None:
    """Remove a folder, if it is there, and everything below it."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)


def read_file(path: StorePath) -> bytes:
    """Return the content of a file."""
    return path.read_bytes() if isinstance(path, Path) else bytes(path.fs.cat_file(path.path))


def write_file(path: StorePath, data: bytes) -> None:
    """Place a file atomically and durably, its folders made as needed."""
    if not isinstance(path, Path):
        with missing_bucket_refused(path):
            path.fs.pipe_file(path.path, data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            write_fully(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def full_disk_refused(path: StorePath, state: Callable[[], str]) -> Iterator[None]:
    """Turn a full disk, quota or file-size limit into a message that says what is safe (`state`).

    Raises:
        StoreError: no space is left; other errors pass through.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE or not isinstance(path, Path):
            raise
        free = shutil.disk_usage(path if path.exists() else path.parent).free
        raise StoreError(
            f"no space left for {path} ({error.strerror}; {free / 2**20:,.0f} MiB free on the "
            f"disk). {state()}. Make room and run the same command again, it resumes."
        ) from error


@contextmanager
def creation_lock(path: StorePath) -> Iterator[None]:
    """Hold `path` while the store itself is made; waits for its turn where that can be done.

    Raises:
        StoreLockedError: on object storage, somebody else makes it.
    """
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _parent_lock(path):
            yield
        return
    lease = Lease(path)
    try:
        yield
    finally:
        lease.release()


@contextmanager
def _parent_lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class FolderLock:
    """Use of a folder until released, alone or `shared`; it ends when the process dies.

    Raises:
        StoreLockedError: another process or writer holds it in a way that excludes this.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self._descriptor: int | None = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(
                self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
            )
        except BlockingIOError as error:
            self.release()
            raise StoreLockedError(
                f"another process is writing {folder}; wait until it ends, or stop it"
            ) from error
        if not folder.exists() or not os.path.samestat(os.fstat(self._descriptor), folder.stat()):
            self.release()  # of a folder that is no longer there, another may hold the new one
            raise StoreLockedError(f"another process has just deleted {folder}; run this again")

    def check(self) -> None:
        """Do nothing: the kernel never gives it away."""

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        if self._descriptor is not None:
            # A forked worker shares the lock: closing alone would leave it held until it ends.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


Lock = FolderLock | Lease


def lock_folder(folder: StorePath, *, shared: bool = False) -> Lock:
    """Return use of a folder, alone or together with all who ask for it `shared`.

    Raises:
        StoreLockedError: another process or writer holds it in a way that excludes this.
    """
    if isinstance(folder, Path):
        return FolderLock(folder, shared=shared)
    return Lease(folder, shared=shared)


def remove_file(path: StorePath) -> None:
    """Remove a file if it is there, durably."""
    if not isinstance(path, Path):
        path.unlink(missing_ok=True)
        return
    with suppress(FileNotFoundError):
        path.unlink()
        sync_folder(path.parent)
