"""Use of a folder on object storage, alone or shared, where no kernel can watch over a lock.

Each writer puts an object of its own, `.lease-<token>`, and only then lists the others. Whoever
finds another that is alive withdraws: of two writers the later one to put is sure to see the
earlier, as listings on S3 (since 2020), GCS and Azure show every finished write. This needs no
conditional writes, which fsspec does not offer on every store. Two that begin in the same moment
may both withdraw. A lease is renewed by a thread; age is told by the server's clock alone, the
other's last change against the own. A lease is dead when it was not renewed for `LEASE_SECONDS`,
or at once when its process has died on this machine. Shared leases, `.lease-shared-<token>`,
suffer each other.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from upath import UPath

from store.errors import StoreError, StoreLockedError
from store.remote import missing_bucket_refused

LEASE_SECONDS = 120.0
_PREFIX = ".lease-"
_SHARED = f"{_PREFIX}shared-"

_logger = logging.getLogger(__name__)


def is_lease(path: str) -> bool:
    """Return whether an object is somebody's lease."""
    return path.rpartition("/")[2].startswith(_PREFIX)


class Lease:
    """Use of a remote folder until released, alone or `shared`, renewed by a thread meanwhile.

    Raises:
        StoreLockedError: another writer holds it in a way that excludes this.
        StoreError: the file system does not tell when an object was written, or refuses writing.
    """

    def __init__(self, folder: UPath, *, shared: bool = False) -> None:
        self._folder = folder
        self._shared = shared
        self._path = folder / f"{_SHARED if shared else _PREFIX}{secrets.token_hex(8)}"
        self._over = threading.Event()
        self._lost = False
        self._put()
        try:
            self._refuse_others()
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuse to go on when the lease may have been taken over; call before each commit.

        Raises:
            StoreLockedError: this process was stopped, or cut off, for longer than a lease lasts.
        """
        if time.monotonic() - self._renewed > LEASE_SECONDS / 2:
            self._renew()
        if self._lost:
            raise StoreLockedError(
                f"this process stood still for more than {LEASE_SECONDS:.0f} s and another may be "
                f"writing {self._folder}; run the same command again, it resumes"
            )

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
            try:
                self._path.unlink(missing_ok=True)
            except StoreError as error:  # not worth hiding why the writer ends
                _logger.warning("lease not removed, it ends by itself: %s", error)

    def _put(self) -> None:
        started = time.monotonic()
        with missing_bucket_refused(self._folder):
            self._path.fs.pipe_file(self._path.path, json.dumps(_myself()).encode())
        self._renewed = started

    def _renew(self) -> None:
        if self._path.exists():
            self._put()
        else:
            self._lost = True

    def _keep(self) -> None:
        while not self._over.wait(LEASE_SECONDS / 4) and not self._lost:
            try:
                self._renew()
            except StoreError as error:  # the next turn tries again; `check` has the last word
                _logger.warning("lease not renewed: %s", error)

    def _refuse_others(self) -> None:
        for path in self._others():
            if self._shared and path.name.startswith(_SHARED):
                continue
            with suppress(FileNotFoundError):  # released since it was listed
                holder, age = _read_holder(path), self._age(path)
                if _is_alive(holder, age):
                    raise StoreLockedError(
                        f"another process is writing {self._folder}: process "
                        f"{holder.get('process')} on {holder.get('host')}, seen {age:.0f} s ago; "
                        f"wait until it ends, or stop it (its lease ends {LEASE_SECONDS:.0f} s "
                        "after the process, at once on the same machine)"
                    )
                path.unlink(missing_ok=True)

    def remove_dead(self) -> None:
        """Remove what is left of leases on the same folder that are known to be over."""
        for path in self._others():
            with suppress(FileNotFoundError):
                if not _is_alive(_read_holder(path), self._age(path)):
                    path.unlink(missing_ok=True)

    def _others(self) -> list[UPath]:
        names = [path for path in self._folder.iterdir() if path.name.startswith(_PREFIX)]
        return [path for path in names if path.name != self._path.name]

    def _age(self, path: UPath) -> float:
        return self._modified(self._path) - self._modified(path)

    def _modified(self, path: UPath) -> float:
        try:
            return float(path.fs.modified(path.path).timestamp())
        except NotImplementedError as error:
            raise StoreError(
                f"{self._folder} does not tell when an object was written, so two writers cannot "
                "be kept apart; write to a local folder and copy the store there"
            ) from error


def _read_holder(path: UPath) -> dict[str, Any]:
    try:
        holder = json.loads(path.fs.cat_file(path.path))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid()}


def _machine() -> str:
    """Return what tells apart everything whose process numbers are not ours; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return ""


def _is_alive(holder: dict[str, Any], age: float) -> bool:
    return age < LEASE_SECONDS and not _died_here(holder)


def _died_here(holder: dict[str, Any]) -> bool:
    process = holder.get("process")
    if not isinstance(process, int) or process < 1 or holder.get("machine") in ("", None):
        return False
    return holder["machine"] == _machine() and not _runs(process)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
