"""Who may do what to a teacher that several processes write, on one machine or on many.

| lock | held by | while |
|---|---|---|
| the teacher's folder, shared | every writer | it is open |
| the teacher's folder, alone | `gc`, `repair` | they change what writers rely on |
| `commit/.lock-teacher` | one writer, others wait | it begins or finishes the teacher |
| `commit/.lock-N` | one writer, others take another shard | it writes shard N |

A local lock is the kernel's and ends with its process, whatever ended it; the file it needs is
empty, and goes when it is released or when the teacher is finished. On object storage each is a
`Lease`. A file system that two machines share must carry `flock` between them, as NFS 4 does.
"""

import fcntl
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from store.errors import StoreLockedError
from store.files import Lock
from store.lease import Lease
from store.remote import StorePath

PATIENCE_SECONDS = 3600.0
"""How long a writer waits for another that begins the teacher, which may have to fit its codecs."""

_FOLDER, _PREFIX = "commit", ".lock-"
_TEACHER = f"{_PREFIX}teacher"

_logger = logging.getLogger(__name__)


class FileLock:
    """Exclusive use of what an empty file stands for; the kernel ends it with the process.

    The file is opened for writing, without which NFS gives no exclusive lock.

    Raises:
        StoreLockedError: another process or writer holds it, or the folder is gone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        while self._descriptor is None:
            self._descriptor = _locked(path)

    def check(self) -> None:
        """Do nothing: the kernel never gives it away."""

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)  # while it is held, so it is nobody else's
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


def _locked(path: Path) -> int | None:
    """Return the open and locked file, None where its last holder removed it in between."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError as error:
        raise StoreLockedError(
            f"another process has just deleted {path.parent.parent}; run this again"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except FileNotFoundError:
        pass  # removed between the two looks
    except BlockingIOError as error:
        os.close(descriptor)
        raise StoreLockedError(f"another process holds {path}") from error
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def lock_shard(folder: StorePath, shard: int) -> Lock | FileLock:
    """Return exclusive use of one shard of a teacher.

    Raises:
        StoreLockedError: another writer is at it.
    """
    return _take(folder / _FOLDER / f"{_PREFIX}{shard}")


def held_shards(folder: Path) -> list[int]:
    """Return the shards of a local teacher that some writer holds now, ascending."""
    prefix = folder / _FOLDER / _PREFIX
    numbers = (path.name.removeprefix(_PREFIX) for path in prefix.parent.glob(f"{_PREFIX}*"))
    return sorted(
        int(one) for one in numbers if one.isdigit() and _held(prefix.with_name(f"{_PREFIX}{one}"))
    )


def _held(path: Path) -> bool:
    """Tell whether a lock's file is locked; who comes to a free one meanwhile looks again later."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def teacher_turn(folder: StorePath) -> Iterator[Lock | FileLock]:
    """Hold what begins and finishes a teacher; waits for its turn, a codec may be fitted meanwhile.

    Raises:
        StoreLockedError: another process holds it for more than `PATIENCE_SECONDS`.
    """
    lock = _patiently(lambda: _take(folder / _FOLDER / _TEACHER), folder)
    try:
        yield lock
    finally:
        lock.release()


def remove_stale_locks(folder: StorePath, presence: Lock) -> None:
    """Remove what killed writers left of their locks; `presence` is the own one of the folder."""
    if isinstance(presence, Lease):
        presence.remove_dead()
    paths: list[StorePath] = [*(folder / _FOLDER).iterdir()]
    for path in paths:
        if path.name.startswith(_PREFIX) and path.name != _TEACHER:
            try:
                _take(path).release()
            except StoreLockedError as error:
                _logger.debug("left alone: %s", error)


def _take(path: StorePath) -> Lock | FileLock:
    return FileLock(path) if isinstance(path, Path) else Lease(path)


def _patiently(take: Callable[[], Lock | FileLock], folder: StorePath) -> Lock | FileLock:
    deadline = time.monotonic() + PATIENCE_SECONDS
    waiting = False
    while True:
        try:
            return take()
        except StoreLockedError:
            if time.monotonic() >= deadline or not folder.exists():
                raise
        if not waiting:
            _logger.info("waiting for another process that begins or finishes %s", folder)
            waiting = True
        # Not in step: on object storage two that come at the same moment both withdraw.
        time.sleep(random.uniform(0.05, 0.5))
