"""The checks of one shard: its commit mark and record, then every byte of its files."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.chunks import read_array, read_chunk
from store.errors import StoreDamagedError
from store.findings import Verification
from store.layout import ArrayLayout, TeacherLayout
from store.pending import merge_shards
from store.shard import ShardReader
from store.statistics import Moments
from store.teacher import QUARANTINED, UNWRITTEN, VALID

_ROUNDING = 1e-12
"""Relative difference of float64 sums that another processor or numpy may explain (fused
multiply-add, order of vector lanes); one wrong float16 in a shard of 10**9 shows more."""

_HASH_BUFFER = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardScene:
    """Where a shard is checked: `usable` (rows of the store,) says which rows must have features.

    `usable` is None where the image table cannot be read; `image` names a row's image.
    """

    folder: Path
    layout: TeacherLayout
    shard: int
    usable: NDArray[np.bool_] | None
    image: Callable[[int], str | None]
    found: Verification

    def damage(self, check: str, what: str, **where: Any) -> None:
        """Note damage of this shard, which is mended by computing it again."""
        name = self.folder.name
        mend = (
            f"`sak verify {self.folder.parent} --repair`, then `sak extract-teachers {name}`: "
            "only this shard is computed again"
        )
        self.found.add("damage", check, what, mend, teacher=name, shard=self.shard, **where)


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
    """Return the levels whose file is there with its full size; note the others."""
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


def read_commit(scene: ShardScene) -> tuple[NDArray[np.uint8] | None, NDArray[np.float64] | None]:
    """Return a shard's file digests (arrays, 32) and moments (3, channels); None where damaged."""
    return tuple(  # type: ignore[return-value]
        _read_or_note(scene, layout) for layout in (scene.layout.digests(), scene.layout.moments())
    )


def check_shard_data(
    scene: ShardScene,
    marks: NDArray[np.uint8],
    sound: set[str],
    advance: Callable[[], None],
) -> set[str]:
    """Read every byte of a shard's files; return the levels in which nothing is wrong."""
    digests, moments = read_commit(scene)
    healthy, start = set(), 0
    channels = {level.name: level.channels for level in scene.layout.spec.levels}
    for number, (level, layout) in enumerate(scene.layout.features().items()):
        width = channels.get(level, 0)
        record = None if moments is None or not width else moments[:, start : start + width]
        start += width
        if level in sound:
            digest = None if digests is None else digests[number].tobytes()
            if _check_file(scene, level, layout, digest, marks, record):
                healthy.add(level)
        advance()
    return healthy


def check_statistics(folder: Path, layout: TeacherLayout, found: Verification) -> None:
    """Compare a finished teacher's statistics with the commit records, merged again.

    Does nothing where a commit record cannot be read: that is noted already.
    """
    name = folder.name
    mend = f"`sak verify {folder.parent} --repair`, then `sak extract-teachers {name}`"
    try:
        merged = merge_shards(folder, layout)
    except StoreDamagedError:
        return
    for level, moments in merged.items():
        expected = moments.statistics() if moments.count else None
        for part, array in layout.statistics(level).items():
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


def _check_file(
    scene: ShardScene,
    level: str,
    layout: ArrayLayout,
    digest: bytes | None,
    marks: NDArray[np.uint8],
    record: NDArray[np.float64] | None,
) -> bool:
    """Check digest, index, rows and moments of one file; return whether all is well."""
    before = len(scene.found.findings)
    path = scene.folder / layout.file_path(scene.shard)
    if digest is not None and _file_digest(path) != digest:
        what = f"{path} is not the file that was committed: its SHA-256 is another"
        scene.damage("data", what, level=level)
    scene.found.bytes_read += path.stat().st_size
    try:
        reader = ShardReader(scene.folder, layout, scene.shard)
    except StoreDamagedError as error:
        scene.damage("data", str(error), level=level)
        return False
    moments = _check_rows(scene, level, layout, reader, marks)
    if moments is not None and record is not None:
        _compare_moments(scene, level, moments, record)
    return not any(finding.severity != "remark" for finding in scene.found.findings[before:])


def _check_rows(
    scene: ShardScene,
    level: str,
    layout: ArrayLayout,
    reader: ShardReader,
    marks: NDArray[np.uint8],
) -> Moments | None:
    """Check each row; return the moments of the valid ones, or None where a row is damaged."""
    first = scene.layout.shard_rows(scene.shard).start
    row = np.empty(layout.shape[1:], layout.dtype)
    channels = layout.shape[-1]
    total, scratch = Moments.empty(channels), np.empty((row.size // channels, channels))
    whole = True
    for slot, mark in enumerate(marks.tolist()):
        where = {"level": level, "row": first + slot}
        try:
            reader.read_into(slot, row)
        except StoreDamagedError as error:
            scene.damage("data", str(error), **where, image=scene.image(first + slot))
            whole = False
            continue
        if mark == VALID:
            with np.errstate(invalid="ignore", over="ignore"):  # the audit counts those
                total = total.merge(Moments.of(row, scratch))
        elif row.any():
            what = "the row is marked quarantined, but is not zero"
            scene.damage("data", what, **where, image=scene.image(first + slot))
    return total if whole else None


def _compare_moments(
    scene: ShardScene, level: str, found: Moments, record: NDArray[np.float64]
) -> None:
    """Compare with the commit record: bit for bit, or to the rounding of another machine."""
    again = found.to_record()
    if np.array_equal(again, record, equal_nan=True):
        return
    scale = np.array([[1.0], [np.abs(record[1]).max() + np.sqrt(record[2].max())], [1.0]])
    scale[2] = record[2].max()
    if np.array_equal(again[0], record[0]) and np.all(np.abs(again - record) <= _ROUNDING * scale):
        scene.found.add(
            "remark", "statistics", "the commit record's statistics differ in the last bits from "
            "those computed here: another processor or numpy rounds differently",
            teacher=scene.folder.name, level=level, shard=scene.shard,
        )  # fmt: skip
        return
    what = "the features do not have the statistics that the commit record says"
    scene.damage("statistics", what, level=level)


def _file_digest(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").digest()
