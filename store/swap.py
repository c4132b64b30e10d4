"""Places a store's root and tables: built aside, then moved in, whole or not at all.

After a kill there may lie beside a folder `features.zarr`:

* `.features.zarr.partial`: tables that were being built, worth nothing;
* `.features.zarr.ready`: complete and durable tables, the store's next state. `settle` moves them
  in, and can be killed and called again at any moment.

On object storage nothing can be renamed: the next state is built at `.ready` below the store,
complete as soon as its root is there, and copied. The first tables of a store are built in place.
"""

import shutil
from pathlib import Path

from upath import UPath

from store.documents import write_document
from store.files import partial_path, ready_path, remove_file, remove_tree, sync_folder
from store.images import ImageTable, ViewTable
from store.layout import METADATA, group_document
from store.remote import StorePath, each
from store.tables import RootRecord, write_tables

TABLES = ("images", "views")


def replace_tables(
    path: StorePath, record: RootRecord, images: ImageTable, views: ViewTable
) -> None:
    """Give a store this root and these tables; only the holder of `creation_lock` may."""
    if not isinstance(path, Path):
        aside = ready_path(path) if (path / METADATA).exists() else path
        for name in TABLES:  # of a run that was killed
            remove_tree(aside / name)
        _build(aside, record, images, views)
        settle(path)
        return
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _build(partial, record, images, views)
        partial.replace(str(ready_path(path)))
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    settle(path)


def _build(folder: StorePath, record: RootRecord, images: ImageTable, views: ViewTable) -> None:
    write_tables(folder, images, views)
    write_document(folder / METADATA, group_document(record.to_attributes()))


def settle(path: StorePath) -> None:
    """Move tables in that are ready, if any; only the holder of `creation_lock` may.

    The old root goes first and the new one comes last: in between a reader is told what to run,
    and never sees the root of one state with a table of another.
    """
    ready = ready_path(path)
    if not ready.is_dir():
        return
    if (ready / METADATA).exists():  # else all is moved, or on object storage none was complete
        remove_file(path / METADATA)
        if isinstance(path, Path):
            _move(path)
        else:
            _copy(path)
    remove_file(ready / METADATA)
    if isinstance(ready, Path):
        shutil.rmtree(ready)
    else:
        remove_tree(ready)


def _move(path: Path) -> None:
    ready = ready_path(path)
    path.mkdir(exist_ok=True)
    for name in TABLES:
        if (ready / name).exists():
            if (path / name).exists():
                shutil.rmtree(path / name)
            (ready / name).replace(path / name)
    sync_folder(path)
    (ready / METADATA).replace(path / METADATA)
    sync_folder(path)
    sync_folder(path.parent)


def _copy(path: UPath) -> None:
    for name in TABLES:
        remove_tree(path / name)
    here = str(path.path).rstrip("/")
    ready = f"{here}/{ready_path(path).name}"
    root = f"{ready}/{METADATA}"
    names = [file.removeprefix(ready) for file in path.fs.find(ready) if file != root]
    each(path, lambda name: path.fs.cp_file(f"{ready}{name}", f"{here}{name}"), names)
    path.fs.cp_file(root, f"{here}/{METADATA}")
