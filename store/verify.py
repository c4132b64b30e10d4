"""Verifies a store: every byte against every other thing that is known about it.

What a flipped bit meets: metadata documents have one spelling and are compared as bytes; small
arrays end in a checksum; the tables have digests at the root; shard files have a SHA-256 in their
commit record, a checksum per row and one of the index; statistics are computed again. Nothing is
written, `repair` aside.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from store.check_codecs import check_codecs
from store.check_metadata import (
    check_description,
    check_root,
    check_root_document,
    check_teacher_files,
    documents_below,
    teacher_folders,
)
from store.check_shards import (
    check_shard_data,
    check_sizes,
    check_statistics,
    read_commit,
    read_mark,
)
from store.errors import StoreDamagedError, StoreError, nearest
from store.feature_findings import audit_target
from store.files import lock_folder, remove_file
from store.findings import Meter, NoMeter, Verification
from store.images import ImageTable
from store.reader import FeatureStore
from store.remote import StorePath, locate
from store.shard_scene import ShardScene
from store.tables import RootRecord, table_layouts
from store.teacher import VALID, TeacherRecord, read_record, write_record


@dataclass(slots=True, kw_only=True)
class _Run:
    """What one verification carries along; `usable` says which rows must have features."""

    path: StorePath
    root: RootRecord | None
    images: ImageTable | None
    usable: NDArray[np.bool_] | None
    quick: bool
    meter: Meter
    found: Verification

    def image(self, row: int) -> str | None:
        """Return the id of a row's image where the table can be read."""
        if self.images is None or self.root is None or row >= self.root.rows:
            return None
        return self.images.ids[row // self.root.views_per_image]


def verify(
    path: str | StorePath,
    teachers: Sequence[str] = (),
    *,
    quick: bool = False,
    meter: Meter | None = None,
) -> Verification:
    """Check a store, or some of its teachers; all findings are collected.

    `quick` leaves the feature files unread: metadata, tables, sizes, marks, statistics only.
    Otherwise memory is one batch of rows and 24 bytes per row and target (level at one resolution); of a URL, one shard file at a time is copied to the disk. `meter` counts shard
    files, then audited rows.

    Raises:
        StoreError: there is no store, one of another format version, or no such teacher.
    """
    path, started = locate(path), time.perf_counter()
    found = Verification(path=str(path))
    root, images = check_root(path, found)
    run = _Run(
        path=path,
        root=root,
        images=images,
        usable=_usable(root, images),
        quick=quick,
        meter=meter or NoMeter(),
        found=found,
    )
    folders = teacher_folders(path, found)
    chosen = _choose(folders, teachers)
    records = {folder.name: check_description(folder, root, found) for folder in chosen}
    good = {name: record for name, record in records.items() if record is not None}
    if root is not None:
        whole = len(chosen) == len(folders) == len(good)
        below = None
        if whole and images is not None:
            tables = table_layouts(images, root.rows, photometric=root.photometric)
            below = documents_below(path, good, tables)
        check_root_document(path, root, below, found)
    for name, record in good.items():
        _check_teacher(run, path / name, record)
    found.seconds = time.perf_counter() - started
    return found


def repair(path: str | StorePath, found: Verification) -> list[str]:
    """Make `sak extract-teachers` compute again what `found` says is damaged; return what was done.

    Works on a URL too. Deletes nothing but the commit marks of damaged shards, and takes back the finished mark of
    their teachers, so that readers refuse them. Healthy shards are not touched.

    Raises:
        StoreLockedError: a writer is at work on such a teacher.
    """
    path, done = locate(path), []
    wrong = [entry for entry in found.findings if entry.severity == "damage" and entry.teacher]
    for name in sorted({str(entry.teacher) for entry in wrong}):
        entries = [entry for entry in wrong if entry.teacher == name]
        shards = sorted({entry.shard for entry in entries if entry.shard is not None})
        if shards or any(entry.check == "statistics" for entry in entries):
            done += _reopen(path / name, shards)
    return done


def _reopen(folder: StorePath, shards: list[int]) -> list[str]:
    try:
        record = read_record(folder)
    except StoreDamagedError:
        return []  # nothing says what the files mean; the finding says what to do
    lock = lock_folder(folder)
    try:
        for shard in shards:  # first: a teacher without its finished mark, but with all commit
            remove_file(folder / record.layout.valid().file_path(shard))  # marks, would be finished
        write_record(folder, replace(record, finished=False))
    finally:
        lock.release()
    what = f"shards {', '.join(map(str, shards))}" if shards else "its statistics"
    return [f"{folder.name}: {what} will be computed again by `sak extract-teachers {folder.name}`"]


def _usable(root: RootRecord | None, images: ImageTable | None) -> NDArray[np.bool_] | None:
    if root is None or images is None:
        return None
    return np.repeat([status == "ok" for status in images.statuses], root.views_per_image)


def _choose(folders: list[StorePath], names: Sequence[str]) -> list[StorePath]:
    known = {folder.name: folder for folder in folders}
    for name in names:
        if name not in known:
            raise StoreError(f"there is no teacher {name!r} to verify: {nearest(name, known)}")
    return [known[name] for name in dict.fromkeys(names)] if names else folders


def _check_teacher(run: _Run, folder: StorePath, record: TeacherRecord) -> None:
    found, layout, name = run.found, record.layout, folder.name
    found.performed |= {(name, "commits")} | (set() if run.quick else {(name, "data")})
    check_teacher_files(folder, layout, found)
    codecs = check_codecs(folder, record, found)
    healthy: dict[str, list[NDArray[np.int64]]] = {target: [] for target in codecs}
    arrays = len(layout.features())
    run.meter.start(f"verify {name}", layout.shards * arrays)
    absent = 0
    for shard in range(layout.shards):
        scene = ShardScene(
            folder=folder,
            layout=layout,
            codecs=codecs,
            shard=shard,
            usable=run.usable,
            image=run.image,
            found=found,
        )
        marks = read_mark(scene, record.finished)
        if marks is None:
            absent += 1
            run.meter.advance(arrays)
            continue
        sound = check_sizes(scene)
        if run.quick:
            read_commit(scene)
            run.meter.advance(arrays)
            continue
        rows = np.flatnonzero(marks == VALID) + layout.shard_rows(shard).start
        for target in check_shard_data(scene, marks, sound, run.meter.advance) & healthy.keys():
            healthy[target].append(rows)
    if record.finished:
        found.performed.add((name, "statistics"))
        check_statistics(folder, layout, found)
        if not run.quick and run.images is not None:
            _audit(run, name, healthy)
        return
    found.add(
        "remark", "commits",
        f"it is not finished: {absent} of {layout.shards} shards are missing",
        f"`sak extract-teachers {name}` goes on with them", teacher=name,
    )  # fmt: skip


def _audit(run: _Run, name: str, healthy: dict[str, list[NDArray[np.int64]]]) -> None:
    try:
        store = FeatureStore(run.path)
        marks = store.valid(name)
    except StoreDamagedError:
        return  # noted already, as damage of what it names
    run.found.performed.add((name, "features"))
    run.meter.start(f"audit {name}", sum(len(part) for parts in healthy.values() for part in parts))
    for target, parts in healthy.items():
        good = np.concatenate([np.empty(0, np.int64), *parts])
        good = good[marks[good]]
        try:
            if len(good):
                audit_target(store, name, target, good, run.found, run.meter.advance)
        except StoreDamagedError as error:
            run.found.add("damage", "features", f"not audited: {error}", teacher=name, level=target)
