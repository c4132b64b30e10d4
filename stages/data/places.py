"""Where an image's bytes lie: in a file, at a URL, in a tar; and reading them, patiently.

Errors that may pass by themselves (a network that is down, a server that is busy, a disk's hiccup)
are tried again after a pause; others (not there, no permission, no file at all) are final at once.
"""

import errno
import os
import random
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from fsspec.core import url_to_fs

Result = TypeVar("Result")

MAX_BYTES = 512 * 2**20
"""No image has more: 8-bit RGB of Pillow's largest image is half of it."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try, shortened by up to a half at random, so that workers that failed
together do not come back together."""

_PASSING_ERRNO = frozenset(
    {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET,
     errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)  # fmt: skip
_PASSING_STATUS = frozenset({408, 425, 429})
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PIECE = 2**20
_WEB = ("http://", "https://")
_HTTP_SECONDS = {"total": 300, "sock_connect": 15, "sock_read": 60}

_random = random.SystemRandom()
_sleep = time.sleep


class UnreadableError(ValueError):
    """Bytes cannot be had; the text is a short reason without any address.

    `passing` says that the same might work later: it was tried again and again in vain.
    """

    def __init__(self, reason: str, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


@dataclass(frozen=True, slots=True)
class Url:
    """An address that an fsspec file system reads; its text hides passwords and signatures."""

    address: str

    def __str__(self) -> str:
        if not self.address.startswith(_WEB):
            return self.address
        parts = urlsplit(self.address)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.address.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self).rstrip("/").rpartition("/")[2]


Address = Path | Url
"""A file or folder: on this machine's disks, or at a URL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """A file within a tar that is not compressed: `size` bytes from `offset`."""

    tar: Address
    name: str
    offset: int
    size: int
    flaw: str = ""
    """Why it is not read, as for a link; "" for a plain file."""

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


Place = Path | Url | TarMember
"""Where the bytes of one image lie."""


def is_remote(place: Place) -> bool:
    """Tell whether bytes come over a network, so that waiting for them takes no core."""
    return isinstance(place.tar if isinstance(place, TarMember) else place, Url)


def address(text: str | Address) -> Address:
    """Return a URL as `Url`, anything else as a path; `file://` is a path too."""
    if isinstance(text, Path | Url):
        return text
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return Url(text) if "://" in text else Path(text)


def files_of(url: Url) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path there; made anew after a fork.

    Raises:
        UnreadableError: no file system of that name is installed.
    """
    options: dict[str, Any] = {}
    if url.address.startswith(_WEB):
        from aiohttp import ClientTimeout

        options = {"client_kwargs": {"timeout": ClientTimeout(**_HTTP_SECONDS)}}
    try:
        files, path = url_to_fs(url.address, **options)
    except (ImportError, ValueError) as error:
        raise UnreadableError(f"no such kind of address: {error}") from error
    return files, path


def read_bytes(place: Place) -> bytes:
    """Return the bytes of an image, trying again where an error may pass.

    Raises:
        UnreadableError: they cannot be had, or are more than `MAX_BYTES`.
    """
    if isinstance(place, TarMember):
        if place.flaw:
            raise UnreadableError(place.flaw)
        _refuse_large(place.size)
    return patiently(lambda: _read_once(place))


def patiently(action: Callable[[], Result]) -> Result:
    """Return what `action` does, called again after each of `PAUSES` where an error may pass.

    Raises:
        UnreadableError: an error is final, or did not pass.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except UnreadableError:
            raise
        except Exception as error:
            if _is_fault_of_ours(error):
                raise
            passing = _is_passing(error)
            if pause is None or not passing:
                raise UnreadableError(_reason(error), passing) from error
        _sleep(pause * _random.uniform(0.5, 1))
    raise AssertionError("the last try returns or raises")


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading; never waits, as plain `open` does for a pipe.

    Raises:
        UnreadableError: it is a pipe, a socket or a device.
        OSError: as `open`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise UnreadableError("not a regular file but a pipe or a device")


def _read_once(place: Place) -> bytes:
    if isinstance(place, TarMember):
        data = _read_part(place.tar, place.offset, place.size)
        if len(data) != place.size:
            raise UnreadableError(
                "the tar is shorter than when it was listed, or not served in parts"
            )
        return data
    if isinstance(place, Path):
        with open_file(place) as file:
            _refuse_large(os.fstat(file.fileno()).st_size)
            return file.read(MAX_BYTES)
    files, path = files_of(place)
    if place.address.startswith(_WEB):
        # A stream, so that a server that never ends is left at the limit; fsspec gives one for a
        # block size of 0, and asks for the size first unless told any.
        with files.open(path, block_size=0, size=1) as stream:
            data = _read_stream(stream)
    else:
        data = bytes(files.cat_file(path))
    _refuse_large(len(data))
    return data


def _read_stream(stream: Any) -> bytes:
    """Return what a stream gives, up to a little more than the limit, in pieces as they come."""
    data = bytearray()
    while len(data) <= MAX_BYTES and (piece := stream.read(_PIECE)):
        data += piece
    return bytes(data)


def _read_part(tar: Address, offset: int, size: int) -> bytes:
    if isinstance(tar, Path):
        with open_file(tar) as file:
            file.seek(offset)
            return file.read(size)
    if not size:
        return b""  # no range has 0 bytes
    files, path = files_of(tar)
    return bytes(files.cat_file(path, start=offset, end=offset + size))


def _refuse_large(size: int) -> None:
    if size > MAX_BYTES:
        raise UnreadableError(f"more than {MAX_BYTES // 2**20} MiB, which no image has")


def _is_fault_of_ours(error: Exception) -> bool:
    library = type(error).__module__.partition(".")[0]
    return library == "stages" or (
        library == "builtins" and not isinstance(error, OSError | ValueError)
    )


def _is_passing(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):  # of aiohttp: an answer that is not what was asked for
        return status in _PASSING_STATUS or status >= 500
    if isinstance(error, (*_FINAL, ValueError)) or "Credential" in type(error).__name__:
        return False
    if isinstance(error, OSError) and type(error).__module__ == "builtins" and error.errno:
        return error.errno in _PASSING_ERRNO or isinstance(error, ConnectionError | TimeoutError)
    return True  # of a client library: no connection, a broken answer, no answer in time


def _reason(error: Exception) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status}"
    if isinstance(error, OSError) and error.strerror and error.errno:
        return f"cannot be read: {os.strerror(error.errno)}"
    if isinstance(error, FileNotFoundError):
        return "not found"
    if isinstance(error, PermissionError):
        return "access denied"
    return f"cannot be fetched: {type(error).__name__}"
