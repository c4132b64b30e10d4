"""Makes a store: its root, images and views, at once or not at all; teachers come later."""

from pathlib import Path

from store.errors import StoreError, StoreMismatchError, difference
from store.files import creation_lock, full_disk_refused
from store.images import OK, ImageTable, ViewTable
from store.layout import METADATA
from store.remote import StorePath, locate
from store.swap import replace_tables, settle
from store.tables import RootRecord, read_images, read_root


def create_store(path: str | StorePath, images: ImageTable, views: ViewTable) -> None:
    """Make a store for these images and views, without any teacher; all at once or not at all.

    Does nothing when the store is there for the same images and views. A folder that holds only
    teachers (DVC removes the rest before it runs a stage again) gets its root back.

    Raises:
        StoreMismatchError: the store is there for other images or views.
        StoreError: the path holds something that is no feature store.
    """
    path = locate(path)
    record = root_of(images, views)
    if not isinstance(path, Path) and _is_there(path, record, images):
        return  # without a lease, which takes the right to write
    with creation_lock(path):
        settle(path)
        if _is_there(path, record, images):
            return
        _refuse_foreign(path)
        with full_disk_refused(path, lambda: "Nothing was written"):
            replace_tables(path, record, images, views)


def root_of(images: ImageTable, views: ViewTable) -> RootRecord:
    """Return what the root of a store of these images and views says.

    Raises:
        StoreError: the views are not those of so many images.
    """
    record = RootRecord(
        images=len(images),
        images_digest=images.digest(),
        views_digest=views.digest(),
        image_size=views.image_size,
        views_per_image=views.views_per_image,
        photometric=views.photometric is not None,
    )
    if len(views) != record.rows:
        raise StoreError(f"{record.rows} rows are needed, the view table has {len(views)}")
    return record


def _is_there(path: StorePath, record: RootRecord, images: ImageTable) -> bool:
    there = (path / METADATA).exists()
    if there:
        _refuse_other(path, record, images)
    return there


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
        old = read_images(path)
        lines += image_difference(old, images)
        if old.image_set() <= images.image_set() and stored.image_size == asked.image_size:
            lines.append("All stored images are there: `sak index --append` adds the new ones.")
    raise StoreMismatchError(
        f"{path} was made for other images or views:\n" + "\n".join(lines) + "\n"
        "Choose another store path, or delete this folder to extract anew."
    )


def image_difference(stored: ImageTable, asked: ImageTable) -> list[str]:
    """Return lines that say how two tables differ, none when they are equal."""
    gone, new = set(stored.ids) - set(asked.ids), set(asked.ids) - set(stored.ids)
    lines = [
        f"  {len(names)} images {where}, such as {min(names)!r}"
        for names, where in ((gone, "only in the store"), (new, "not in the store"))
        if names
    ]
    healed = [name for name in _quarantined(stored) - _quarantined(asked) if name not in gone]
    if healed:
        lines.append(
            f"  {len(healed)} quarantined images can be read now, such as {min(healed)!r}: "
            "`sak index --retry-quarantined` lets them in"
        )
    columns = ("ids", "sha256", "heights", "widths", "statuses")
    for name in columns:
        pairs = enumerate(zip(getattr(stored, name), getattr(asked, name), strict=False))
        first = next(((index, pair) for index, pair in pairs if pair[0] != pair[1]), None)
        if first is not None:
            index, (old, now) = first
            lines.append(f"  first difference in {name}, image {index}: {old!r} against {now!r}")
            break
    return lines


def _quarantined(images: ImageTable) -> set[str]:
    return {name for name, status in zip(images.ids, images.statuses, strict=True) if status != OK}
