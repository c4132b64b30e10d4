"""Places a store's root and tables: built beside the store, then moved in, whole or not at all.

Beside `features.zarr` there may lie, after a kill:

* `.features.zarr.partial`: tables that were being built, worth nothing;
* `.features.zarr.ready`: complete and durable tables, the store's next state. `settle` moves them
  in, and can be killed and called again at any moment.
"""

import shutil
from pathlib import Path

from store.documents import write_document
from store.files import partial_path, ready_path, remove_file, sync_folder
from store.layout import METADATA, group_document
from store.spec import ImageTable, ViewTable
from store.tables import RootRecord, write_tables

TABLES = ("images", "views")


def replace_tables(path: Path, record: RootRecord, images: ImageTable, views: ViewTable) -> None:
    """Give a store this root and these tables; only the holder of `parent_lock` may."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_tables(partial, images, views)
        write_document(partial / METADATA, group_document(record.to_attributes()))
        partial.replace(ready_path(path))
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    settle(path)


def settle(path: Path) -> None:
    """Move tables in that are ready, if any; only the holder of `parent_lock` may.

    The old root goes first and the new one comes last: in between a reader is told what to run,
    and never sees the root of one state with a table of another.
    """
    ready = ready_path(path)
    if not ready.is_dir():
        return
    if (ready / METADATA).exists():  # else all is moved but the empty folder
        path.mkdir(exist_ok=True)
        remove_file(path / METADATA)
        for name in TABLES:
            if (ready / name).exists():
                _replace_folder(ready / name, path / name)
        sync_folder(path)
        (ready / METADATA).replace(path / METADATA)
        sync_folder(path)
        sync_folder(path.parent)
    shutil.rmtree(ready)


def _replace_folder(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    source.replace(target)
