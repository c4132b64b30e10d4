"""WebDataset tars: finding the images within, without unpacking anything.

A sample's images are named `<key>.<suffix>`; the id is `<tar's name>/<key>`, so that the order in
which tars are listed changes nothing. Where each member begins is kept in an index file, and a tar
is listed again only when its size, time or tag has changed. Names are never used as paths.
"""

import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

import pyarrow
import pyarrow.parquet

from stages.data.places import (
    Address,
    TarMember,
    UnreadableError,
    Url,
    address,
    files_of,
    open_file,
    patiently,
)
from stages.data.sources import IMAGE_SUFFIXES, ImageSource, SourceError, check_ids

Result = TypeVar("Result")

_AT_ONCE = 16
_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER = 4 * 2**20  # bytes of one long name or one set of extended attributes
_MARKS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "updated", "created")
"""Where file systems say which version of a file this is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One image of a tar, as the index keeps it."""

    tar: str
    version: str
    name: str
    offset: int
    size: int
    flaw: str


def list_tars(
    shards: Sequence[str], index: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES
) -> tuple[ImageSource, ...]:
    """List the images of all tars, ordered by id.

    `shards` are paths or URLs, with `*` or ranges such as `{000..099}`. `index` is written where
    it does not hold all of them as they are now.

    Raises:
        SourceError: no such tar, one is damaged or compressed, no image in any, two have one id.
    """
    tars = [tar for pattern in shards for tar in _expand(pattern)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        versions = dict(zip(map(_key, tars), pool.map(_version, tars), strict=True))
        entries, known = [], _read_index(index)
        stale = []
        for tar in tars:
            found = [
                entry for entry in known.get(_key(tar), ()) if entry.version == versions[_key(tar)]
            ]
            entries.extend(found)
            stale += [] if found else [tar]
        for tar, members in zip(stale, pool.map(_scan, stale), strict=True):
            entries += [
                _Entry(tar=_key(tar), version=versions[_key(tar)], **member) for member in members
            ]
    if not entries:
        raise SourceError(f"{', '.join(shards)}: no tar holds an image")
    if stale:
        _write_index(index, entries)
    sources = [_source(entry) for entry in entries if _suffix(entry.name) in suffixes]
    if not sources:
        raise SourceError(f"{', '.join(shards)}: no image has a suffix of {' '.join(suffixes)}")
    check_ids(sources)
    return tuple(sorted(sources, key=lambda source: source.id))


def expand_ranges(pattern: str) -> Iterator[str]:
    """Write out ranges such as `{008..010}`: their numbers keep the width of the first."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        name = str(number).zfill(len(first))
        yield from expand_ranges(pattern[: found.start()] + name + pattern[found.end() :])


def _expand(pattern: str) -> list[Address]:
    found: list[Address] = []
    for name in expand_ranges(pattern):
        place = address(name)
        if not has_magic(name):
            found.append(place)
        elif isinstance(place, Path):
            found += map(Path, sorted(glob(name)))
        else:
            found += _remote_glob(place)
    if not found:
        raise SourceError(f"no tar is called {pattern}")
    return found


def _remote_glob(pattern: Url) -> list[Url]:
    def look() -> list[Url]:
        files, path = files_of(pattern)
        files.invalidate_cache()
        return [Url(files.unstrip_protocol(name)) for name in sorted(files.glob(path))]

    return _told(pattern, look)


def _key(tar: Address) -> str:
    return str(tar.absolute()) if isinstance(tar, Path) else tar.address


def _told(place: Address, action: Callable[[], Result]) -> Result:
    try:
        return patiently(action)
    except UnreadableError as error:
        raise SourceError(f"{place}: {error}") from error


def _version(tar: Address) -> str:
    def ask() -> str:
        if isinstance(tar, Path):
            status = tar.stat()
            return f"{status.st_size} {status.st_mtime_ns}"
        files, path = files_of(tar)
        files.invalidate_cache()
        told = files.info(path)
        return " ".join(str(told[key]) for key in ("size", *_MARKS) if key in told)

    return _told(tar, ask)


def _scan(tar: Address) -> list[dict[str, Any]]:
    """Return name, offset, size and flaw of every image member, in the order of the tar."""

    def look() -> list[dict[str, Any]]:
        with _opened(tar) as file:
            return list(_members(tar, file))

    return _told(tar, look)


@contextmanager
def _opened(tar: Address) -> Iterator[Any]:
    if isinstance(tar, Path):
        with open_file(tar) as local:
            yield local
        return
    files, path = files_of(tar)
    with files.open(path, "rb") as remote:
        yield remote


class _Headers:
    """A tar's file whose headers cannot ask for more memory than a header needs."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return bytes(self._file.read(size))


def _members(tar: Address, file: Any) -> Iterator[dict[str, Any]]:
    try:
        with tarfile.open(fileobj=cast(Any, _Headers(file)), mode="r:") as archive:
            for member in archive:
                if _is_image(member):
                    yield {
                        "name": member.name,
                        "offset": member.offset_data,
                        "size": member.size,
                        "flaw": _flaw(member),
                    }
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise SourceError(
            f"{tar} cannot be listed as a tar ({error}); it is damaged, or compressed: images are "
            "read from the middle of it, so unpack .tar.gz and the like to plain .tar"
        ) from error
    _refuse_unlisted(tar, file, end)


def _refuse_unlisted(tar: Address, file: Any, end: int) -> None:
    """Refuse a tar whose listing stopped before its end: `tarfile` takes some damage for it."""
    file.seek(end)
    first = file.read(_BLOCK)
    if first != bytes(_BLOCK):
        what = "has no end mark" if len(first) < _BLOCK else "has a damaged header"
        raise SourceError(f"{tar} {what} at byte {end}: it is cut off or damaged; copy it again")
    while block := file.read(2**20):
        if any(block):
            raise SourceError(
                f"{tar} goes on behind its end mark at byte {end}, as tars that were joined do; "
                "pack its files anew"
            )


def _suffix(name: str) -> str:
    """Return what follows the first dot of the name proper, as WebDataset has it."""
    return "." + PurePosixPath(name).name.partition(".")[2].lower()


def _is_image(member: tarfile.TarInfo) -> bool:
    hidden = PurePosixPath(member.name).name.startswith(".")
    return not (hidden or member.isdir()) and _suffix(member.name) in IMAGE_SUFFIXES


def _flaw(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "its name in the tar leads out of the tar"
    if member.issym() or member.islnk():
        return "a link within the tar, not a file"
    if member.sparse is not None:
        return "stored with holes (GNU sparse), pack it anew"
    return "" if member.isreg() else "not a regular file but a pipe or a device"


def _source(entry: _Entry) -> ImageSource:
    tar = address(entry.tar)
    path = PurePosixPath(entry.name)
    key = (path.parent / path.name.partition(".")[0]).as_posix()
    place = TarMember(
        tar=tar, name=entry.name, offset=entry.offset, size=entry.size, flaw=entry.flaw
    )
    return ImageSource(id=f"{tar.name.removesuffix('.tar')}/{key}", path=place)


def _read_index(path: Path) -> dict[str, list[_Entry]]:
    """Return what the index knows by tar; nothing where it is not there or not whole."""
    try:
        table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
        rows = table.to_pylist()
        entries = [_Entry(**row) for row in rows]
    except (OSError, ValueError, TypeError):  # made anew from the tars: they are the truth
        return {}
    found: dict[str, list[_Entry]] = {}
    for entry in entries:
        found.setdefault(entry.tar, []).append(entry)
    return found


def _write_index(path: Path, entries: Iterable[_Entry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    import pandas as pd

    frame = pd.DataFrame([asdict(entry) for entry in entries])
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    with tempfile.TemporaryDirectory(prefix=".sak-index-", dir=path.parent) as folder:
        made = Path(folder, path.name)
        pyarrow.parquet.write_table(table, made, write_page_checksum=True)
        os.replace(made, path)
