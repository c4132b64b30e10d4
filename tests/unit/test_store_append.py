"""A store that grows: every row stays where it was, whole shards stay as they were."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from store.admit import stored_images
from store.append import append_images, in_stored_order
from store.calibration import FittedTarget
from store.chunks import read_chunk
from store.create import create_store
from store.errors import StoreError, StoreMismatchError, UnfinishedStoreError
from store.images import ImageTable
from store.inspect import summarise
from store.reader import FeatureStore
from store.spec import GLOBAL, TeacherSpec
from store.teacher import UNWRITTEN, is_committed, is_teacher, read_record
from store.teacher_layout import TeacherLayout
from store.testing import (
    KILL_LOOP,
    file_digests,
    sample_codecs,
    sample_features,
    sample_images,
    sample_shard_bytes,
    sample_teacher,
    sample_views,
    write_rows,
    write_store,
)
from store.writer import FeatureWriter

SPEC = sample_teacher()
PYRAMID = ((3, 4), (1, 2))
SPECS = [SPEC] + [sample_teacher(codec=codec, stored=PYRAMID) for codec in ("int8", "pca-2bit")]
CODECS = {spec.codec: sample_codecs(spec, 64) for spec in SPECS[1:]}
ROW_BYTES = {spec.codec: sample_shard_bytes(spec, 1) for spec in SPECS}


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power cuts here


def grow(path: Path, count: int, views: int = 1) -> None:
    append_images(path, sample_images(count), sample_views(count * views, views))


def open_writer(path: Path, spec: TeacherSpec, rows_per_shard: int = 4) -> FeatureWriter:
    """Open a writer that must not fit codecs anew where the teacher is there already."""
    begun = (path / spec.name / "zarr.json").exists()

    def calibrate() -> dict[str, FittedTarget]:
        assert not begun
        return CODECS[spec.codec]

    size = rows_per_shard * ROW_BYTES[spec.codec]
    return FeatureWriter.open(path, spec, size, calibrate=calibrate)


def extract(path: Path, shards: int = 10**6, spec: TeacherSpec = SPEC) -> None:
    """Write that many of the missing shards, and finish when none is left."""
    with open_writer(path, spec) as writer:
        missing = writer.missing()
        for rows in missing[:shards]:
            write_rows(writer, spec, rows)
        if shards >= len(missing):
            writer.finish()


def expected(spec: TeacherSpec, level: str, rows: Iterable[int]) -> NDArray[np.floating[Any]]:
    """Return what a reader must find, at the finest resolution."""
    every = [sample_features(spec, range(row, row + 1))[level][0] for row in rows]
    if spec.codec in CODECS and level != GLOBAL:
        codec = CODECS[spec.codec][f"{level}/native"].codec
        every = [codec.decode(codec.encode(values)) for values in every]
        return np.stack(every)
    return np.stack(every).astype(np.float16)


def assert_reads_back(path: Path, rows: int) -> None:
    store = FeatureStore(path)
    assert store.rows == rows
    assert len(store.views) == rows
    for level in store.levels("small"):
        found = store.read("small", level, range(rows))
        np.testing.assert_array_equal(found, expected(SPEC, level, range(rows)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", sample_images(6), SPEC)
    return tmp_path / "store"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.codec)
def test_a_grown_store_is_the_one_made_at_once(spec: TeacherSpec, tmp_path: Path) -> None:
    path = tmp_path / "store"
    write_store(path, sample_images(6), spec)
    kept = next((path / "small" / "stage_1" / "native").glob("c.0.*"))
    before = kept.stat()
    grow(path, 11)
    with open_writer(path, spec) as writer:
        assert writer.missing() == [range(4, 8), range(8, 11)]
    extract(path, spec=spec)
    for resolution in FeatureStore(path).grids("small", "stage_1"):
        assert len(FeatureStore(path).read("small", "stage_1", range(11), resolution)) == 11
    write_store(tmp_path / "whole", sample_images(11), spec)
    assert file_digests(path) == file_digests(tmp_path / "whole")
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["store", "whole"]


def test_appending_what_is_there_changes_nothing(path: Path) -> None:
    before = file_digests(path)
    grow(path, 6)
    assert file_digests(path) == before


def test_an_earlier_teacher_is_unfinished_with_the_command(path: Path) -> None:
    grow(path, 11)
    store = FeatureStore(path)
    assert store.unfinished == ("small",)
    assert dict(store.teachers) == {}
    with pytest.raises(UnfinishedStoreError, match=r"6 of 11 rows; run `sak extract-teachers smal"):
        store.read("small", "stage_1", [0])
    summary = summarise(path).teachers[0]
    assert (summary.finished, summary.coverage) == (False, 6 / 11)
    extract(path, shards=1)
    with pytest.raises(UnfinishedStoreError, match="1 of 3 shards are missing"):
        FeatureStore(path).read("small", "stage_1", [0])


def test_a_teacher_begun_before_two_appends_catches_up(path: Path, tmp_path: Path) -> None:
    grow(path, 7)
    extract(path, shards=0)  # grown, nothing written
    grow(path, 13)
    extract(path)
    write_store(tmp_path / "whole", sample_images(13), SPEC)
    assert file_digests(path) == file_digests(tmp_path / "whole")


def test_a_teacher_is_unfinished_before_its_arrays_grow(path: Path) -> None:
    placed: list[str] = []
    real = os.replace

    def replace_and_note(source: Any, target: Any) -> None:
        placed.append(str(Path(target).relative_to(path / "small")))
        real(source, target)

    grow(path, 11)
    with mock.patch("os.replace", replace_and_note):
        FeatureWriter.open(path, SPEC).close()
    assert placed[0] == "zarr.json"
    assert "stage_1/native/zarr.json" in placed


def test_another_specification_does_not_grow(path: Path) -> None:
    grow(path, 11)
    before = file_digests(path)
    with pytest.raises(StoreMismatchError, match="weights_sha256"):
        FeatureWriter.open(path, sample_teacher(weights_sha256="cd" * 32))
    assert file_digests(path) == before


def test_a_teacher_of_other_images_is_not_taken_for_an_earlier_one(path: Path) -> None:
    for name in ("images", "views"):
        shutil.rmtree(path / name)
    (path / "zarr.json").unlink()
    create_store(path, sample_images(11, quarantined=[1]), sample_views(11))
    assert FeatureStore(path).unfinished == ()
    with pytest.raises(StoreMismatchError, match="other images or views"):
        FeatureStore(path).valid("small")
    with pytest.raises(StoreMismatchError, match="images_digest"):
        FeatureWriter.open(path, SPEC)


def test_a_root_that_was_lost_is_made_anew_for_more_images(path: Path) -> None:
    (path / "zarr.json").unlink()
    create_store(path, sample_images(11), sample_views(11))
    extract(path)
    assert_reads_back(path, 11)


@pytest.mark.parametrize("rows", [1, 3, 5, 6, 7])
def test_a_short_shard_is_never_whole_in_a_longer_store(tmp_path: Path, rows: int) -> None:
    write_store(tmp_path, sample_images(rows), SPEC)
    last = (rows - 1) // 4
    for more in range(rows + 1, 12):
        layout = TeacherLayout(spec=SPEC, rows=more, rows_per_shard=4)
        for array in layout.features().values():  # sizes that no longer tell, as if compressed
            file = tmp_path / "small" / array.file_path(last)
            os.truncate(file, array.file_bytes(last))
        marks = read_chunk(tmp_path / "small", layout.valid(), last)
        assert (marks == UNWRITTEN).any()
        assert not is_committed(tmp_path / "small", layout, last)


def other(images: ImageTable, **columns: Any) -> ImageTable:
    """Return the table with the second entry of some columns replaced."""
    changed = {
        name: (getattr(images, name)[0], value, *getattr(images, name)[2:])
        for name, value in columns.items()
    }
    return replace(images, **changed)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (other(sample_images(9), sha256="ff" * 32), "difference in sha256, image 1: .*ffff"),
        (other(sample_images(9), ids="new"), "1 images only in the store, such as 'room/0001-é'"),
        (sample_images(9).take([1, 0, *range(2, 9)]), "difference in ids, image 0"),
        (sample_images(5), "images: store has 6, asked for 5"),
    ],
)
def test_stored_images_must_stay(path: Path, images: ImageTable, message: str) -> None:
    before = file_digests(path)
    with pytest.raises(StoreMismatchError, match=message):
        append_images(path, images, sample_views(len(images)))
    assert file_digests(path) == before


def test_stored_views_must_stay(path: Path) -> None:
    views = sample_views(9)
    views.boxes[2, 0] = 7
    with pytest.raises(StoreMismatchError, match="views_digest"):
        append_images(path, sample_images(9), views)
    with pytest.raises(StoreMismatchError, match="views_per_image: store has 1, asked for 2"):
        grow(path, 9, views=2)


def test_views_of_every_image_grow_along(tmp_path: Path) -> None:
    write_store(tmp_path / "store", sample_images(3), SPEC, views_per_image=2)
    grow(tmp_path / "store", 5, views=2)
    extract(tmp_path / "store")
    write_store(tmp_path / "whole", sample_images(5), SPEC, views_per_image=2)
    assert file_digests(tmp_path / "store") == file_digests(tmp_path / "whole")


def test_there_must_be_a_store_to_append_to(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no feature store at .*run `sak index`"):
        grow(tmp_path / "store", 3)


def test_create_advises_to_append_when_images_were_added(path: Path) -> None:
    mixed = sample_images(8).take([6, 0, 1, 2, 7, 3, 4, 5])
    with pytest.raises(StoreMismatchError, match="`sak index --append` adds the new ones"):
        create_store(path, mixed, sample_views(8))
    with pytest.raises(StoreMismatchError) as caught:
        create_store(path, other(mixed, ids="new"), sample_views(8))
    assert "--append" not in str(caught.value)


def test_stored_order_puts_new_images_last(path: Path, tmp_path: Path) -> None:
    mixed = sample_images(8).take([7, 0, 5, 1, 6, 3, 4, 2])
    ordered = in_stored_order(path, mixed)
    assert ordered.ids == tuple(mixed.ids[place] for place in (1, 3, 7, 5, 6, 2, 0, 4))
    assert in_stored_order(tmp_path / "none", mixed) == mixed
    with pytest.raises(StoreMismatchError, match="2 stored images are gone, such as 'room/0004-é'"):
        in_stored_order(path, sample_images(4))
    with pytest.raises(StoreMismatchError, match="heights, image 0: 480 against 1"):
        in_stored_order(path, other(mixed, heights=1))


def test_a_reader_from_before_is_told_to_open_again(path: Path) -> None:
    early = FeatureStore(path)
    late = FeatureStore(path)
    expected = early.read("small", "stage_1", range(6))
    grow(path, 11)
    np.testing.assert_array_equal(late.read("small", "stage_1", range(6)), expected)
    extract(path)
    np.testing.assert_array_equal(early.read("small", "stage_1", range(6)), expected)
    for ask in (
        lambda: late.images,
        lambda: late.views,
        lambda: late.read("small", "stage_2", [5]),
        lambda: late.statistics("small", "stage_1"),
        lambda: late.array("small", "global"),
    ):
        with pytest.raises(StoreMismatchError, match="open it again"):
            ask()


class Stopped(BaseException):
    """Stands for an interruption at a system call, with the clean-up of a living process."""


@contextmanager
def stopped_after(calls: int) -> Iterator[None]:
    left = calls

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Stopped
            return real(*arguments, **options)

        return call

    replacing = mock.patch("os.replace", counted(os.replace))
    with suppress(Stopped), replacing, mock.patch("os.writev", counted(os.writev)):
        yield


def identity(file: Path) -> tuple[int, int, str]:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest()


def whole_shards(path: Path) -> dict[Path, tuple[int, int, str]]:
    """Return the files of committed shards that no further image can make longer."""
    folder = path / "small"
    if not is_teacher(folder):
        return {}
    layout = read_record(folder).layout
    shards = [
        shard
        for shard in range(layout.shards)
        if len(layout.shard_rows(shard)) == layout.rows_per_shard
        and is_committed(folder, layout, shard)
    ]
    arrays = [*layout.features().values(), *layout.commits(), layout.valid()]
    files = [folder / array.file_path(shard) for array in arrays for shard in shards]
    return {file: identity(file) for file in files}


@settings(max_examples=10, deadline=None)
@given(spec=st.sampled_from(SPECS), data=st.data())
def test_any_appends_interrupted_anywhere(spec: TeacherSpec, data: st.DataObject) -> None:
    counts = sorted(data.draw(st.sets(st.integers(1, 20), min_size=1, max_size=4), label="images"))
    bad = data.draw(st.sets(st.integers(1, 19), max_size=4), label="quarantined")
    per_shard = data.draw(st.integers(1, 7), label="rows per shard")

    def bring_to(path: Path, count: int) -> None:
        table, views = sample_images(count, tuple(bad)), sample_views(count)
        if (
            stored_images(path) is not None
        ):  # which first completes what was stopped, as `sak index`
            append_images(path, table, views)
        else:
            create_store(path, table, views)
        valid = np.array([status == "ok" for status in table.statuses])
        with open_writer(path, spec, per_shard) as writer:
            for rows in writer.missing():
                write_rows(writer, spec, rows, valid)
            writer.finish()

    with TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        whole: dict[Path, tuple[int, int, str]] = {}
        for count in counts:
            for calls in data.draw(st.lists(st.integers(1, 90), max_size=2), label="stops"):
                with stopped_after(calls):
                    bring_to(path, count)
            if data.draw(st.booleans(), label="extract before the next append"):
                bring_to(path, count)
            assert {file: identity(file) for file in whole} == whole
            whole |= whole_shards(path)
        bring_to(path, counts[-1])
        once = Path(folder) / "once"
        bring_to(once, counts[-1])
        assert {file: identity(file) for file in whole} == whole
        assert file_digests(path) == file_digests(once)
        store = FeatureStore(path)
        good = np.flatnonzero(store.valid("small"))
        for level in store.levels("small"):
            np.testing.assert_array_equal(
                store.read("small", level, good), expected(spec, level, good)
            )


KILLED = """
import sys
from store.append import append_images
from store.testing import *
from store.writer import FeatureWriter
spec = sample_teacher(codec=sys.argv[3], stored=((3, 4), (1, 2)))

def run(path):
    append_images(path, sample_images(11), sample_views(11))
    with FeatureWriter.open(path, spec) as writer:
        for rows in writer.missing():
            write_rows(writer, spec, rows)
        writer.finish()
"""


def seen_by_a_reader(path: Path, spec: TeacherSpec) -> str:
    """Say what a reader finds: so many rows, all of them right, or which command is to be run."""
    try:
        store = FeatureStore(path)
        assert len(store.images) == len(store.views) == store.rows
        found = store.read("small", "stage_1", range(store.rows))
        np.testing.assert_array_equal(found, expected(spec, "stage_1", range(store.rows)))
        return str(store.rows)
    except StoreError as error:
        return str(error).partition("; run `")[2].partition("`")[0]


@pytest.mark.parametrize(("codec", "step"), [("float16", 13), ("pca-2bit", 17)])
def test_killed_at_any_moment_of_append_and_extract(codec: str, step: int, tmp_path: Path) -> None:
    spec = sample_teacher(codec=codec, stored=PYRAMID)
    write_store(tmp_path / "store", sample_images(6), spec)
    command = [sys.executable, "-c", KILLED + KILL_LOOP, str(tmp_path), str(step), codec]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    last = int(done.stdout)
    write_store(tmp_path / "whole", sample_images(11), spec)
    whole = file_digests(tmp_path / "whole")
    states: dict[str, int] = {}
    for moment in range(1, last, step):
        killed = tmp_path / str(moment) / "store"
        state = seen_by_a_reader(killed, spec)
        states[state] = states.get(state, 0) + 1
        grow(killed, 11)
        extract(killed, spec=spec)
        assert file_digests(killed.parent) == {
            f"store/{name}": digest for name, digest in whole.items()
        }
        shutil.rmtree(killed.parent)
    assert states.keys() >= {"6", "sak index --append", "sak extract-teachers"}
    assert states.keys() <= {
        "6",
        "11",
        "sak index --append",
        "sak extract-teachers small",
        "sak extract-teachers",
    }
    assert sum(states.values()) > 15


@pytest.mark.parametrize("resume", [create_store, append_images])
def test_create_completes_an_append_too(path: Path, resume: Any) -> None:
    real = os.replace

    def stop_at_the_root(source: Any, target: Any) -> None:
        if Path(target) == path / "zarr.json":
            raise Stopped
        real(source, target)

    with mock.patch("os.replace", stop_at_the_root), pytest.raises(Stopped):
        grow(path, 11)
    with pytest.raises(StoreError, match="stopped while images were added; run `sak index --app"):
        FeatureStore(path)
    resume(path, sample_images(11), sample_views(11))
    assert FeatureStore(path).rows == 11
    assert [entry.name for entry in path.parent.iterdir()] == ["store"]
