"""Makes a store: its root, images and views, at once or not at all; teachers come later."""

import shutil
from pathlib import Path

from store.documents import write_document
from store.errors import StoreError, StoreMismatchError, difference
from store.files import (
    creation_lock,
    full_disk_refused,
    partial_path,
    remove_tree,
    sync_folder,
)
from store.layout import METADATA, group_document
from store.remote import StorePath, locate
from store.spec import ImageTable, ViewTable
from store.tables import RootRecord, read_images, read_root, write_tables


def create_store(path: str | StorePath, images: ImageTable, views: ViewTable) -> None:
    """Make a store for these images and views, without any teacher; all at once or not at all.

    Does nothing when the store is there for the same images and views. A folder that holds only
    teachers (DVC removes the rest before it runs a stage again) gets its root back.

    Raises:
        StoreMismatchError: the store is there for other images or views.
        StoreError: the path holds something that is no feature store.
    """
    path = locate(path)
    record = RootRecord(
        images=len(images),
        images_digest=images.digest(),
        views_digest=views.digest(),
        image_size=views.image_size,
        views_per_image=views.views_per_image,
    )
    if len(views) != record.rows:
        raise StoreError(f"{record.rows} rows are needed, the view table has {len(views)}")
    if not isinstance(path, Path) and _is_there(path, record, images):
        return  # without a lease, which takes the right to write
    with creation_lock(path):
        if _is_there(path, record, images):
            return
        _refuse_foreign(path)
        with full_disk_refused(path, lambda: "Nothing was written"):
            _build(path, record, images, views)


def _is_there(path: StorePath, record: RootRecord, images: ImageTable) -> bool:
    there = (path / METADATA).exists()
    if there:
        _refuse_other(path, record, images)
    return there


def _build(path: StorePath, record: RootRecord, images: ImageTable, views: ViewTable) -> None:
    if not isinstance(
        path, Path
    ):  # nothing can be renamed, but nobody reads before the root is there
        for name in ("images", "views"):
            remove_tree(path / name)
        write_tables(path, images, views)
        write_document(path / METADATA, group_document(record.to_attributes()))
        return
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_tables(partial, images, views)
        write_document(partial / METADATA, group_document(record.to_attributes()))
        path.mkdir(exist_ok=True)
        for name in ("images", "views", METADATA):
            if (path / name).exists():  # torn by a kill between these renames; root not yet there
                shutil.rmtree(path / name)
            (partial / name).replace(path / name)
        sync_folder(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_foreign(path: StorePath) -> None:
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file; choose another path for the store")
    for entry in path.iterdir() if path.exists() else ():
        if entry.name.startswith("."):  # DVC keeps a .gitignore there
            continue
        if not entry.is_dir() or (any(entry.iterdir()) and not any(entry.rglob(METADATA))):
            raise StoreError(
                f"{path} holds {entry.name!r}, which is no part of a feature store; "
                "choose another path or an empty folder"
            )


def _refuse_other(path: StorePath, asked: RootRecord, images: ImageTable) -> None:
    stored = read_root(path)
    if stored == asked:
        return
    lines = difference(stored.to_attributes(), asked.to_attributes())
    if stored.images_digest != asked.images_digest:
        lines += _image_difference(read_images(path), images)
    raise StoreMismatchError(
        f"{path} was made for other images or views:\n" + "\n".join(lines) + "\n"
        "Choose another store path, or delete this folder to extract anew."
    )


def _image_difference(stored: ImageTable, asked: ImageTable) -> list[str]:
    gone, new = set(stored.ids) - set(asked.ids), set(asked.ids) - set(stored.ids)
    lines = [
        f"  {len(names)} images {where}, such as {min(names)!r}"
        for names, where in ((gone, "only in the store"), (new, "not in the store"))
        if names
    ]
    columns = ("ids", "sha256", "heights", "widths", "statuses")
    for name in columns:
        pairs = enumerate(zip(getattr(stored, name), getattr(asked, name), strict=False))
        first = next(((index, pair) for index, pair in pairs if pair[0] != pair[1]), None)
        if first is not None:
            index, (old, now) = first
            lines.append(f"  first difference in {name}, image {index}: {old!r} against {now!r}")
            break
    return lines
