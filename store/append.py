"""Grows a store by images; what is written stays, teachers catch up when they are extracted again.

The grown tables hold the stored images first, so every row keeps its number and whole shards stay
as they are. A teacher of fewer rows is recognised by the digests of the rows it has seen.
"""

from dataclasses import replace

from store.create import image_difference, root_of
from store.errors import StoreMismatchError, difference
from store.files import creation_lock, full_disk_refused
from store.images import ImageTable, ViewTable
from store.layout import METADATA
from store.remote import StorePath, locate
from store.swap import replace_tables, settle
from store.tables import RootRecord, read_images, read_root


def append_images(path: str | StorePath, images: ImageTable, views: ViewTable) -> None:
    """Grow a store to these images and views; the first entries must be those it has already.

    Whatever moment a kill hits, the store is the old one, the new one, or refused with the command
    that completes it. Does nothing when the store has just these images and views.

    Raises:
        StoreMismatchError: a stored image or view is gone, changed or in another place.
        StoreError: there is no store, the tables do not fit each other, or the disk is full.
    """
    path = locate(path)
    asked = root_of(images, views)
    with creation_lock(path):
        settle(path)
        stored = read_root(path)
        if stored == asked:
            return
        _refuse_changed(path, stored, images, views)
        with full_disk_refused(path, lambda: "The store is as it was"):
            replace_tables(path, replace(asked, earlier=stored.earlier), images, views)


def in_stored_order(path: str | StorePath, images: ImageTable) -> ImageTable:
    """Return the images in the order to append them: those stored first, then the new ones.

    Without a store the order stays. New images keep the order among themselves.

    Raises:
        StoreMismatchError: a stored image is not among `images`, or has changed.
    """
    path = locate(path)
    with creation_lock(path):
        settle(path)
        if not (path / METADATA).exists():
            return images
        stored = read_images(path)
    places = {name: place for place, name in enumerate(images.ids)}
    gone = [name for name in stored.ids if name not in places]
    if gone:
        _refuse(path, [f"  {len(gone)} stored images are gone, such as {gone[0]!r}"])
    known = set(stored.ids)
    added = [place for name, place in places.items() if name not in known]
    ordered = images.take([places[name] for name in stored.ids] + added)
    if changed := image_difference(stored, ordered.take(range(len(stored)))):
        _refuse(path, changed)
    return ordered


def _refuse_changed(
    path: StorePath, stored: RootRecord, images: ImageTable, views: ViewTable
) -> None:
    count = min(stored.images, len(images))
    kept = images.take(range(count))
    first = root_of(kept, views.first(count * views.views_per_image))
    if first != stored:
        lines = difference(stored.to_attributes(), first.to_attributes())
        if first.images_digest != stored.images_digest:
            lines += image_difference(read_images(path), kept)
        _refuse(path, lines)


def _refuse(path: StorePath, lines: list[str]) -> None:
    raise StoreMismatchError(
        f"{path} cannot grow, the images it lists must all be there as they were:\n"
        + "\n".join(lines)
        + "\nPut them back, choose another store path, or delete this folder to extract anew."
    )
