"""Lets quarantined images in that can be read after all, without touching what is written.

Only the tables change, whole and at once as when images are added. The root remembers the state
that each teacher was extracted for, so a teacher of before is known as unfinished, not foreign:
its writer takes back the commit marks of the shards that hold such rows and computes them anew.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from store.create import image_difference, root_of
from store.errors import StoreMismatchError
from store.files import creation_lock, full_disk_refused
from store.images import OK, ImageTable, ViewTable
from store.layout import METADATA
from store.remote import StorePath, locate
from store.swap import replace_tables, settle
from store.tables import RootRecord, TableState, read_images, read_root, read_views
from store.teacher import is_earlier, read_record, teacher_folders


def admit_images(path: str | StorePath, images: ImageTable, views: ViewTable) -> None:
    """Give a store these images and views, which may differ in quarantined images that are now ok.

    Whatever moment a kill hits, the store is the old one, the new one, or refused with the command
    that completes it. Does nothing when the store has just these images and views.

    Raises:
        StoreMismatchError: anything else differs.
        StoreError: there is no store, a teacher's description is damaged, or the disk is full.
    """
    path = locate(path)
    asked = root_of(images, views)
    with creation_lock(path):
        settle(path)
        stored = read_root(path)
        if stored == asked:
            return
        _refuse_other_changes(path, images, views)
        record = replace(asked, earlier=_states(path, stored))
        with full_disk_refused(path, lambda: "The store is as it was"):
            replace_tables(path, record, images, views)


def stored_images(path: str | StorePath) -> ImageTable | None:
    """Return the images of a store, None where there is no store yet.

    Raises:
        StoreDamagedError: they are not what the store's root records.
    """
    path = locate(path)
    if not isinstance(path, Path) and (path / METADATA).exists():
        return read_images(path)  # without a lease, which takes the right to write
    with creation_lock(path):
        settle(path)
        return read_images(path) if (path / METADATA).exists() else None


def admitted(stored: ImageTable, tried: ImageTable) -> ImageTable:
    """Return `stored` with the entries of `tried` that are ok in place of quarantined ones."""
    return _replaced(stored, tried, lambda old, new: old != OK == new)


def with_stored_reasons(images: ImageTable, stored: ImageTable) -> ImageTable:
    """Return `images` with the stored entry of each that is quarantined then and now.

    Reasons may differ from one time to the next, as those of a network do.
    """
    return _replaced(images, stored, lambda now, old: OK not in (now, old))


def _replaced(
    images: ImageTable, others: ImageTable, wanted: Callable[[str, str], bool]
) -> ImageTable:
    places = {name: place for place, name in enumerate(others.ids)}
    entries = []
    for place, name in enumerate(images.ids):
        other = places.get(name)
        if other is not None and wanted(images.statuses[place], others.statuses[other]):
            entries.append(others.entry(other))
        else:
            entries.append(images.entry(place))
    return ImageTable.of(entries)


def _states(path: StorePath, stored: RootRecord) -> tuple[TableState, ...]:
    """Return the state of the store and those that its teachers were extracted for."""
    records = [read_record(folder) for folder in teacher_folders(path)]
    known = [record.state for record in records if is_earlier(path, record)]
    return tuple(dict.fromkeys([*known, stored.state]))


def _refuse_other_changes(path: StorePath, images: ImageTable, views: ViewTable) -> None:
    old_images, old_views = read_images(path), read_views(path)
    expected = admitted(old_images, images)
    lines = image_difference(expected, images)
    if not lines:
        rows = np.repeat(
            [old == new for old, new in zip(old_images.statuses, images.statuses, strict=True)],
            old_views.views_per_image,
        )
        same_size = old_views.image_size == views.image_size
        if not same_size or old_views.bytes_of(rows) != views.bytes_of(rows):
            lines = ["  views of images that were not quarantined differ"]
    if lines:
        raise StoreMismatchError(
            f"{path} takes quarantined images back, and no other change:\n"
            + "\n".join(lines)
            + "\nPut the other images back as they were, or choose another store path."
        )
