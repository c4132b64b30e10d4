"""What `sak gc` may delete, and what it never does."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from store.append import append_images
from store.collect import collect_garbage
from store.create import create_store
from store.errors import StoreError, StoreLockedError
from store.files import FolderLock
from store.reader import FeatureStore
from store.testing import sample_images, sample_teacher, sample_views, write_rows, write_store
from store.writer import FeatureWriter


class Stopped(BaseException):
    pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for name in ("small", "second"):
        write_store(tmp_path / "store", sample_images(6), sample_teacher(name))
    return tmp_path / "store"


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_sound_store_has_no_garbage(path: Path) -> None:
    before = files(path)
    assert collect_garbage(path, delete=True) == []
    assert collect_garbage(path, keep=["small", "second", "planned"], delete=True) == []
    assert files(path) == before


@pytest.mark.parametrize("ask", [{"drop": ["second"]}, {"keep": ["small"]}])
def test_teachers_go_only_when_asked(path: Path, ask: dict[str, Any]) -> None:
    bytes_before, before = size(path / "second"), files(path)
    listed = collect_garbage(path, **ask)
    assert files(path) == before
    assert [(one.path, one.bytes) for one in listed] == [(path / "second", bytes_before)]
    assert collect_garbage(path, **ask, delete=True) == listed
    assert files(path) == {name for name in before if not name.startswith("second")}
    assert list(FeatureStore(path).teachers) == ["small"]


def test_an_unknown_teacher_is_refused_before_anything_goes(path: Path) -> None:
    before = files(path)
    with pytest.raises(StoreError, match="did you mean 'second'"):
        collect_garbage(path, drop=["small", "secnd"], delete=True)
    with pytest.raises(StoreError, match="there is no feature store"):
        collect_garbage(path / "nowhere", delete=True)
    assert files(path) == before


def test_what_is_being_written_stays(path: Path) -> None:
    append_images(path, sample_images(9), sample_views(9))
    spec = sample_teacher("second")
    with FeatureWriter.open(path, spec) as writer:
        start = writer.missing()[0].start
        write_rows(writer, spec, range(start, start + 1))
        before = files(path)
        found = collect_garbage(path, keep=["small"], delete=True)
        assert [(one.path, one.busy) for one in found] == [(path / "second", True)]
        assert all(one.busy for one in collect_garbage(path, delete=True))
        assert files(path) == before
        assert any(name.endswith(".partial") for name in before)


@pytest.mark.parametrize("again", [True, False])
def test_a_lock_on_a_folder_that_was_deleted_is_none(path: Path, again: bool) -> None:
    real = fcntl.flock

    def flock_late(descriptor: int, how: int) -> None:
        if how != fcntl.LOCK_UN:
            (path / "second").rename(path.parent / "gone")
            if again:
                (path / "second").mkdir()
        real(descriptor, how)

    with (
        mock.patch("fcntl.flock", flock_late),
        pytest.raises(StoreLockedError, match=r"has just deleted .*second; run this again"),
    ):
        FolderLock(path / "second")


def test_temporary_files_of_a_killed_writer_go(path: Path) -> None:
    before = files(path)
    left = path / "small" / "stage_1" / "native" / ".c.0.0.0.0.partial"
    left.write_bytes(b"half")
    (found,) = collect_garbage(path, delete=True)
    assert (found.path, found.bytes, found.busy) == (left, 4, False)
    assert files(path) == before


@pytest.mark.parametrize("stop", range(1, 30, 4))
def test_deletion_stopped_anywhere_leaves_no_teacher_and_goes_on(path: Path, stop: int) -> None:
    real, calls = os.unlink, 0

    def unlink(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Stopped
        real(*arguments, **options)

    with mock.patch("os.unlink", unlink), pytest.raises(Stopped):
        collect_garbage(path, drop=["second"], delete=True)
    store = FeatureStore(path)
    assert list(store.teachers) == ["small"]
    assert store.unfinished == ()
    write_store(path, sample_images(6), sample_teacher("second"))  # the name is free at once
    assert collect_garbage(path, delete=True)
    assert collect_garbage(path) == []
    assert list(FeatureStore(path).teachers) == ["second", "small"]


def test_a_teacher_without_its_description_goes(path: Path) -> None:
    (path / "second" / "zarr.json").unlink()
    (found,) = collect_garbage(path, delete=True)
    assert (found.path, found.reason) == (path / "second", "teacher without its description")
    assert not found.path.exists()


def test_tables_of_a_killed_append_go(path: Path) -> None:
    left = path.with_name(".store.partial")
    create_store(left, sample_images(3), sample_views(3))
    with_lock = FolderLock(path.parent)
    (found,) = collect_garbage(path, delete=True)
    assert found.busy
    assert left.exists()
    with_lock.release()
    (found,) = collect_garbage(path, delete=True)
    assert not found.busy
    assert os.listdir(path.parent) == ["store"]


@pytest.mark.parametrize("moment", ["images", "zarr.json"])
def test_a_stopped_append_is_completed(path: Path, moment: str) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == path / moment:
            raise Stopped
        real(source, target)

    with mock.patch("os.replace", replace), pytest.raises(Stopped):
        append_images(path, sample_images(9), sample_views(9))
    with pytest.raises(StoreError, match="run `sak index --append`"):
        collect_garbage(path)
    (found,) = collect_garbage(path, delete=True)
    assert (found.path, found.bytes) == (path.with_name(".store.ready"), 0)
    assert len(FeatureStore(path).images) == 9
    assert os.listdir(path.parent) == ["store"]


def test_what_is_not_ours_is_never_named(path: Path) -> None:
    shutil.copytree(path / "small" / "stage_1", path / "notes")  # no teacher, though Zarr
    (path / "photos").mkdir()
    (path / "photos" / ".cat.partial").write_bytes(b"")
    (path / ".gitignore").write_text("/small\n")
    (path / ".cache").mkdir()
    (path / "link").symlink_to(path / "second")
    beside = path.with_name(".store.partial")
    beside.mkdir()
    (beside / "thesis.tex").write_text("")
    before = files(path.parent)
    assert collect_garbage(path, keep=["small", "second"], delete=True) == []
    assert files(path.parent) == before
