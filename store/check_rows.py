"""Checks every byte of one shard file: digest, index, rows, and the statistics of what they say."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from store.codecs import BitCodec, Codec
from store.errors import StoreDamagedError
from store.layout import ArrayLayout
from store.remote import StorePath
from store.row_moments import RowMoments
from store.shard import ShardReader
from store.shard_scene import ShardScene
from store.statistics import Moments
from store.teacher import VALID

_ROUNDING = 1e-5
"""Relative difference of sums that another processor or numpy may explain: they are in float32
over some hundred tokens, 6e-8 for each term with signs as they fall. Other rows' statistics differ
by far more, and single bytes have checksums."""
_MIXED_ROUNDING = 1e-6
"""The same of a product of matrices, of the largest value that enters it."""


def check_file(
    scene: ShardScene,
    target: str,
    layout: ArrayLayout,
    digest: bytes | None,
    marks: NDArray[np.uint8],
    record: Moments | None,
) -> bool:
    """Check digest, index, rows and moments of one file; return whether all is well.

    `record` are the moments of the commit record, None where they cannot be read or are not kept.
    """
    before = len(scene.found.findings)
    path = scene.folder / layout.file_path(scene.shard)
    with _at_hand(path) as copy:
        scene.found.bytes_read += copy.stat().st_size
        try:
            reader = ShardReader(scene.folder, layout, scene.shard, copy)
        except StoreDamagedError as error:
            scene.damage("data", str(error), level=target)
            return False
        if digest is not None and reader.digest() != digest:
            what = f"{path} is not the file that was committed: its digest differs"
            scene.damage("data", what, level=target)
        moments = _check_rows(scene, target, layout, reader, marks, record)
    if moments is not None and record is not None:
        _compare_moments(scene, target, moments, record)
    return not any(finding.severity != "remark" for finding in scene.found.findings[before:])


@contextmanager
def _at_hand(path: StorePath) -> Iterator[Path]:
    """Give a local file, read row by row: itself, or a copy of an object."""
    if isinstance(path, Path):
        yield path
        return
    with TemporaryDirectory(prefix="sak-verify-") as folder:
        copy = Path(folder) / path.name
        path.fs.get_file(path.path, str(copy))
        yield copy


def _check_rows(
    scene: ShardScene,
    target: str,
    layout: ArrayLayout,
    reader: ShardReader,
    marks: NDArray[np.uint8],
    record: Moments | None,
) -> Moments | None:
    """Check each row; return the moments of the valid ones, or None where they cannot be had."""
    first = scene.layout.shard_rows(scene.shard).start
    row = np.empty(layout.shape[1:], layout.dtype)
    codec = scene.codecs.get(target)
    rows = None if record is None or codec is None else _row_moments(codec, record)
    total = None if record is None else Moments.empty(len(record.mean), record.comoment is not None)
    whole = True
    for slot, mark in enumerate(marks.tolist()):
        where = {"level": target, "row": first + slot}
        try:
            reader.read_into(slot, row)
        except StoreDamagedError as error:
            scene.damage("data", str(error), **where, image=scene.image(first + slot))
            whole = False
            continue
        if mark == VALID and rows is not None and total is not None:
            with np.errstate(invalid="ignore", over="ignore"):  # the audit counts those
                total = total.merge(rows(row))
        elif mark != VALID and row.any():
            what = "the row is marked quarantined, but is not zero"
            scene.damage("data", what, **where, image=scene.image(first + slot))
    return total if whole and rows is not None else None


def _row_moments(codec: Codec, like: Moments) -> RowMoments:
    return RowMoments(codec, len(like.mean), like.comoment is not None)


def _compare_moments(scene: ShardScene, target: str, found: Moments, record: Moments) -> None:
    """Compare with the commit record: bit for bit, or to the rounding of another machine."""
    pairs = [(found.mean, record.mean), (found.m2, record.m2)]
    if found.comoment is not None and record.comoment is not None:
        pairs.append((found.comoment, record.comoment))
    same_count = found.count == record.count
    if same_count and all(np.array_equal(*pair, equal_nan=True) for pair in pairs):
        return
    near = all(
        np.all(np.abs(again - stored) <= limit)
        for (again, stored), limit in zip(
            pairs, _rounding(found, scene.codecs[target]), strict=False
        )
    )
    if same_count and near:
        scene.found.add(
            "remark", "statistics", "the commit record's statistics differ in the last bits from "
            "those computed here: another processor or numpy rounds differently",
            teacher=scene.folder.name, level=target, shard=scene.shard,
        )  # fmt: skip
        return
    what = "the features do not have the statistics that the commit record says"
    scene.damage("statistics", what, level=target)


def _rounding(moments: Moments, codec: Codec) -> Iterator[NDArray[np.float64]]:
    """Yield how far mean, sums of squares and co-moments of another machine may be from these.

    Of each channel for itself, by its own spread; where a rotation mixes channels, a strong one
    leaves its rounding in all of them.
    """
    deviation = np.sqrt(moments.m2 / max(moments.count, 1))
    scale = np.abs(moments.mean) + deviation
    mixed = isinstance(codec, BitCodec) or getattr(codec, "rotation", None) is not None
    stray = _MIXED_ROUNDING * scale.max() if mixed else 0.0
    spread = _ROUNDING * deviation + stray
    yield _ROUNDING * scale + stray
    yield moments.count * (2 * deviation + spread) * spread
    yield moments.count * (np.outer(deviation, spread) + np.outer(spread, deviation + spread))
