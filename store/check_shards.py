"""The checks of one shard: its commit mark and record, then every byte of its files."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.check_rows import check_file
from store.chunks import read_array, read_chunk
from store.errors import StoreDamagedError
from store.findings import Verification
from store.layout import ArrayLayout
from store.pending import merge_shards, split_record
from store.remote import StorePath
from store.shard_scene import ShardScene
from store.statistics import Moments
from store.teacher import QUARANTINED, UNWRITTEN, VALID
from store.teacher_layout import TeacherLayout


def read_mark(scene: ShardScene, finished: bool) -> NDArray[np.uint8] | None:
    """Return a shard's row marks, or None where it is not committed; notes what is wrong."""
    layout = scene.layout.valid()
    path = scene.folder / layout.file_path(scene.shard)
    if not finished and not path.exists():
        return None
    try:
        marks: NDArray[np.uint8] = read_chunk(scene.folder, layout, scene.shard)
    except StoreDamagedError as error:
        scene.damage("commits", str(error))
        return None
    if not np.isin(marks, (VALID, QUARANTINED)).all():
        state = "unwritten" if np.any(marks == UNWRITTEN) else "in a way the format does not know"
        scene.damage("commits", f"{path} marks rows of a committed shard {state}")
        return None
    _compare_marks(scene, marks)
    return marks


def check_sizes(scene: ShardScene) -> set[str]:
    """Return the targets whose file is there with its full size; note the others."""
    sound = set()
    for level, layout in scene.layout.features().items():
        path, expected = (
            scene.folder / layout.file_path(scene.shard),
            layout.file_bytes(scene.shard),
        )
        if not path.is_file():
            scene.damage("files", f"{path} is missing", level=level)
        elif (size := path.stat().st_size) != expected:
            what = f"{path} should have {expected} bytes, it has {size}"
            scene.damage("files", what, level=level)
        else:
            sound.add(level)
    return sound


def read_commit(scene: ShardScene) -> tuple[NDArray[np.uint8] | None, dict[str, Moments]]:
    """Return a shard's file digests (arrays, 32), None where damaged, and moments by target."""
    layout = scene.layout
    digests, *records = (_read_or_note(scene, array) for array in layout.commits())
    sound = [record for record in records if record is not None]
    return digests, split_record(layout, *sound) if len(sound) == len(records) else {}


def check_shard_data(
    scene: ShardScene,
    marks: NDArray[np.uint8],
    sound: set[str],
    advance: Callable[[], None],
) -> set[str]:
    """Read every byte of a shard's files; return the targets in which nothing is wrong."""
    digests, moments = read_commit(scene)
    healthy = set()
    for number, (target, layout) in enumerate(scene.layout.features().items()):
        if target in sound:
            digest = None if digests is None else digests[number].tobytes()
            if check_file(scene, target, layout, digest, marks, moments.get(target)):
                healthy.add(target)
        advance()
    return healthy


def check_statistics(folder: StorePath, layout: TeacherLayout, found: Verification) -> None:
    """Compare a finished teacher's statistics with the commit records, merged again.

    Does nothing where a commit record cannot be read: that is noted already.
    """
    name = folder.name
    mend = f"`sak verify {folder.parent} --repair`, then `sak extract-teachers {name}`"
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # records that were tampered with
            merged = merge_shards(folder, layout)
    except StoreDamagedError:
        return
    for target in layout.spec.targets:
        moments, level = merged[target.name], target.name
        expected = moments.statistics() if moments.count else None
        for part, array in layout.statistics(target).items():
            try:
                stored = read_array(folder, array)
            except StoreDamagedError as error:
                found.add("damage", "statistics", str(error), mend, teacher=name, level=level)
                continue
            if expected is None or not np.array_equal(
                stored, getattr(expected, part), equal_nan=True
            ):
                what = f"{folder / array.path} is not what the commit records add up to"
                found.add("damage", "statistics", what, mend, teacher=name, level=level)


def _compare_marks(scene: ShardScene, marks: NDArray[np.uint8]) -> None:
    if scene.usable is None:
        return
    rows = scene.layout.shard_rows(scene.shard)
    wrong = (marks == VALID) != scene.usable[rows.start : rows.stop]
    for row in (np.flatnonzero(wrong) + rows.start).tolist():
        marked = "valid" if marks[row - rows.start] == VALID else "quarantined"
        listed = "usable" if scene.usable[row] else "quarantined"
        what = f"the row is marked {marked}, the image table lists its image as {listed}"
        scene.damage("commits", what, row=row, image=scene.image(row))


def _read_or_note(scene: ShardScene, layout: ArrayLayout) -> NDArray[Any] | None:
    try:
        entry: NDArray[Any] = read_chunk(scene.folder, layout, scene.shard)[0]
    except StoreDamagedError as error:
        scene.damage("commits", str(error))
        return None
    return entry
