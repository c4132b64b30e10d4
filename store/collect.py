"""Finds and deletes what a store no longer needs: dropped teachers and what killed runs left.

Only what is recognisably this package's is ever named, and all of it under the lock of whoever
could be writing it. A teacher is renamed aside before a file of it goes, so that no reader takes
what a kill leaves for a teacher. Object storage has no renames: there its description goes first,
and what tells that the rest was a teacher goes last.
"""

import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from upath import UPath

from store.errors import StoreError, StoreLockedError, nearest
from store.files import (
    Lock,
    lock_folder,
    partial_path,
    partials,
    ready_path,
    remove_file,
    sync_folder,
)
from store.layout import METADATA
from store.lease import is_lease
from store.remote import StorePath, each, locate
from store.swap import TABLES, settle
from store.tables import read_root
from store.teacher import is_teacher, teacher_folders

_Found = Iterator[tuple[StorePath, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """Something to delete; `busy` where another process may be writing it, so that it stays.

    `bytes` is the sum of the files' sizes, 0 where it is busy or will be moved, not deleted.
    """

    path: StorePath
    reason: str
    bytes: int
    busy: bool


def collect_garbage(
    path: str | StorePath,
    *,
    drop: Collection[str] = (),
    keep: Collection[str] | None = None,
    delete: bool = False,
) -> list[Garbage]:
    """Return what can go from a store, and delete it if asked to.

    These are the teachers named in `drop`, where `keep` is given all that it does not name,
    teachers deleted or begun halfway, and temporary files in the store and beside it. An append
    that was stopped when its tables were complete is not undone but completed.

    Raises:
        StoreError: there is no store, or no teacher of a name in `drop`; nothing was deleted.
    """
    path = locate(path)
    if not path.is_dir():
        read_root(path)
    known = {folder.name for folder in teacher_folders(path)}
    for name in sorted(set(drop) - known):
        raise StoreError(f"teacher {name!r} is not in {path}: {nearest(name, known)}")
    dropped = set(drop) if keep is None else set(drop) | (known - set(keep))
    owner = path.parent if isinstance(path, Path) else path  # as `creation_lock` has it
    found = _collect(path, owner, partial(_left_beside, path), delete)
    read_root(path)
    folders = (entry for entry in path.iterdir() if _may_be_ours(entry))
    for folder in sorted(folders, key=lambda entry: entry.name):
        found += _collect(path, folder, partial(_left_inside, folder, dropped), delete)
    return found


def _left_beside(path: StorePath) -> _Found:
    ready = ready_path(path)
    if isinstance(path, Path):
        tables = partial_path(path)
        ours = {*TABLES, METADATA, partial_path(path / METADATA).name}
        if tables.is_dir() and {entry.name for entry in tables.iterdir()} <= ours:
            yield tables, "tables that were never completed"
    if ready.is_dir():
        if isinstance(ready, Path) or (ready / METADATA).exists():
            yield ready, "tables of a stopped append, moved into the store"
        else:
            yield ready, "tables that were never completed"


def _left_inside(folder: StorePath, dropped: Collection[str]) -> _Found:
    if folder.name.startswith("."):
        yield folder, "teacher that was being deleted"
    elif not (folder / METADATA).exists():
        yield folder, "teacher without its description"
    elif folder.name in dropped:
        yield folder, "teacher that is not asked for"
    else:
        yield from ((file, "temporary file of a stopped run") for file in partials(folder))


def _may_be_ours(entry: StorePath) -> bool:
    """Whether an entry of a store is a teacher's folder, or was one."""
    if entry.is_symlink() or not entry.is_dir():
        return False
    if entry.name.startswith("."):  # only in a folder
        return entry.name == partial_path(Path(entry.name[1:]).with_suffix("")).name
    return is_teacher(entry) or (
        not (entry / METADATA).exists() and (entry / "commit" / METADATA).is_file()
    )


def _collect(
    path: StorePath, owner: StorePath, find: Callable[[], _Found], delete: bool
) -> list[Garbage]:
    try:
        lock: Lock = lock_folder(owner)
    except StoreLockedError:
        return [Garbage(path=one, reason=why, bytes=0, busy=True) for one, why in find()]
    try:
        found = [
            Garbage(path=one, reason=why, bytes=_bytes(path, one), busy=False)
            for one, why in find()
        ]
        for one in found if delete else ():
            lock.check()
            _delete(path, one.path)
        return found
    finally:
        lock.release()


def _delete(path: StorePath, garbage: StorePath) -> None:
    if garbage == ready_path(path):
        settle(path)
    elif not garbage.is_dir():
        garbage.unlink()
    elif isinstance(garbage, Path):
        _delete_folder(garbage)
    else:
        _delete_objects(garbage)


def _delete_folder(folder: Path) -> None:
    aside = folder
    if not folder.name.startswith("."):
        aside = partial_path(folder)
        if aside.exists():  # of an earlier teacher of this name
            shutil.rmtree(aside)
        folder.replace(aside)
        sync_folder(folder.parent)
    shutil.rmtree(aside)


def _delete_objects(folder: UPath) -> None:
    remove_file(folder / METADATA)
    mark = folder / "commit" / METADATA
    others = [file for file in _files(folder) if file != mark]
    each(folder, lambda file: file.unlink(), others)
    remove_file(mark)


def _files(folder: StorePath) -> list[StorePath]:
    """Return the files below a folder, but for the leases, which their holders remove."""
    if isinstance(folder, Path):
        return [file for file in folder.rglob("*") if file.is_file()]
    names = [name.removeprefix(folder.path).lstrip("/") for name in folder.fs.find(folder.path)]
    return [folder / name for name in names if not is_lease(name)]


def _bytes(path: StorePath, garbage: StorePath) -> int:
    if garbage == ready_path(path) and (garbage / METADATA).exists():
        return 0
    files = [garbage] if garbage.is_file() else _files(garbage)
    return sum(each(path, lambda file: file.stat().st_size, files))
