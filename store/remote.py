"""Stores on object storage: any URL that an fsspec file system serves, `s3://bucket/x.zarr` first.

Endpoint and credentials come from where the file system itself looks. For S3 these are the
variables and files of AWS's own tools (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE;
AWS_ENDPOINT_URL for MinIO, R2 and others); fsspec's configuration sets anything else, such as
FSSPEC_S3='{"config_kwargs": {"max_pool_connections": 64}}' for more reads at a time.

What differs from a folder: an object appears whole or not at all, so nothing is renamed or synced;
there are no empty folders; a listing is a request, so many small requests go out at once.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec
from upath import UPath

from store.errors import StoreError

StorePath = Path | UPath
"""A store's folder, or anything below it: a local path, or a URL's."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")

_AT_ONCE = 32
_LOCAL = frozenset({"", "file", "local"})
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"} | dict.fromkeys(
    ("abfs", "abfss", "adl", "az"), "adlfs"
)


def locate(path: str | StorePath) -> StorePath:
    """Return the path of a store: absolute for a folder, guarded (see `RemoteFiles`) for a URL.

    Raises:
        StoreError: the URL's file system is unknown or not installed.
    """
    text = str(path)
    if not isinstance(path, UPath) and "://" not in text:
        if broken := re.match(r"([a-z][a-z0-9+.]+):/(?=[^/])", text):
            raise StoreError(
                f"{text} is a URL that has lost a slash: pass it as text, "
                f"'{broken[1]}://...', pathlib.Path cannot hold one"
            )
        return Path(path).absolute()
    try:
        url: UPath = UPath(path)
        if url.protocol in _LOCAL:
            return Path(url.path).absolute()
        fsspec.get_filesystem_class(url.protocol)
        url = UPath(text.rstrip("/"), **url.storage_options)
    except ImportError as error:
        package = _PACKAGES.get(text.partition("://")[0], "the fsspec file system for it")
        extra = "pip install 'sak-distill[s3]'" if package == "s3fs" else f"pip install {package}"
        raise StoreError(f"{text} needs {package}, which is not installed: {extra}") from error
    except ValueError as error:
        raise StoreError(f"{text} is no address of a store: {error}") from error
    url._fs_cached = cast(Any, RemoteFiles(text, url.protocol, dict(url.storage_options)))
    return url


class RemoteFiles:
    """An fsspec file system whose errors are `StoreError`s and that works after a fork.

    Nothing is remembered from listings: another process may be writing. `FileNotFoundError` and
    its kin pass through, and unlike in fsspec only these mean that something is not there.
    """

    def __init__(self, url: str, protocol: str, options: dict[str, Any]) -> None:
        self._url = url
        self._protocol = protocol
        self._options = {"use_listings_cache": False, **options}
        self._made: tuple[int, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        with remote_errors(self._url):
            value = getattr(self._files(), name)
        return self._guarded(value) if callable(value) else value

    def exists(self, path: str) -> bool:
        """Return whether there is an object, or anything below."""
        return self._kind(path) is not None

    def isfile(self, path: str) -> bool:
        """Return whether there is an object."""
        return self._kind(path) == "file"

    def isdir(self, path: str) -> bool:
        """Return whether there is anything below."""
        return self._kind(path) == "directory"

    def _kind(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def _files(self) -> Any:
        if self._made is None or self._made[0] != os.getpid():  # connections do not survive a fork
            self._made = (os.getpid(), fsspec.filesystem(self._protocol, **self._options))
        return self._made[1]

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with remote_errors(self._url):
                return function(*arguments, **options)

        return call


@contextmanager
def remote_errors(where: object) -> Iterator[None]:
    """Turn what a file system or its client library raises into a message with advice.

    Raises:
        StoreError: no access, no network, or whatever else the other side says.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, StoreError):
        raise
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package in ("numcodecs", "zarr"):
            raise  # of what was read, not of reading it
        if package == "builtins" and not isinstance(error, OSError):
            raise  # a fault of ours
        reason = f"{type(error).__name__}: {error}"
        raise StoreError(f"{where} cannot be used: {reason}; {_advice(error)}") from error


def _advice(error: Exception) -> str:
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return (
            "check credentials and permissions (for S3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; the store is read, listed, written and deleted)"
        )
    return (
        "check the network and the address (AWS_ENDPOINT_URL where S3 is not Amazon's), then run "
        "the same command again: what was committed is safe"
    )


@contextmanager
def missing_bucket_refused(path: StorePath) -> Iterator[None]:
    """Turn the one cause for "not found" while writing into a message.

    Raises:
        StoreError: the bucket does not exist.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} cannot be written: {error}; create the bucket first, or correct its name"
        ) from error


def each(folder: StorePath, function: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
    """Return `function` of each item, in order; many at a time where each costs a round trip."""
    if isinstance(folder, Path):
        return [function(item) for item in items]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))
