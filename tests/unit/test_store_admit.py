"""Quarantined images are let in: only their shards are computed anew, whatever is killed when."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.admit import admit_images, admitted, stored_images, with_stored_reasons
from store.append import append_images
from store.create import create_store
from store.errors import StoreDamagedError, StoreError, StoreMismatchError, UnfinishedStoreError
from store.images import ImageTable
from store.reader import FeatureStore
from store.tables import read_root
from store.testing import (
    KILL_LOOP,
    sample_features,
    sample_images,
    sample_shard_bytes,
    sample_teacher,
    sample_views,
    write_rows,
    write_store,
)
from store.verify import verify
from store.writer import FeatureWriter

SPEC = sample_teacher()
BAD = (1, 5, 10)
FOUR_ROWS = sample_shard_bytes(SPEC, 4)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power cuts here


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Eleven images in three shards, one of them quarantined in each."""
    write_store(tmp_path / "store", sample_images(11, BAD), SPEC)
    return tmp_path / "store"


def admit(path: Path, bad: tuple[int, ...] = (), count: int = 11, views: int = 1) -> None:
    admit_images(path, sample_images(count, bad), sample_views(count * views, views))


def extract(path: Path) -> list[range]:
    """Write what is missing, and return it."""
    store = FeatureStore(path)
    views = store.views.views_per_image
    valid = np.repeat([status == "ok" for status in store.images.statuses], views)
    with FeatureWriter.open(path, SPEC, FOUR_ROWS) as writer:
        missing = writer.missing()
        for rows in missing:
            write_rows(writer, SPEC, rows, valid)
        writer.finish()
    return missing


def tree(path: Path) -> dict[str, str]:
    """Return a digest of every file's content, but for the memory of earlier states."""
    found = {}
    for file in path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            if file == path / "zarr.json":
                document = json.loads(content)
                document["attributes"].pop("earlier", None)
                content = json.dumps(document).encode()
            found[str(file.relative_to(path))] = hashlib.sha256(content).hexdigest()
    return found


def test_only_shards_with_admitted_images_are_written_again(path: Path, tmp_path: Path) -> None:
    kept = next((path / "small" / "stage_1" / "native").glob("c.1.*")).stat()
    admit(path, bad=(5,))
    with pytest.raises(UnfinishedStoreError, match=r"taken out of quarantine.*`sak extract-teach"):
        FeatureStore(path).read("small", "stage_1", [0])
    assert FeatureStore(path).unfinished == ("small",)
    assert verify(path).clean
    assert extract(path) == [range(4), range(8, 11)]
    assert (FeatureStore(path).valid("small") == (np.arange(11) != 5)).all()
    after = next((path / "small" / "stage_1" / "native").glob("c.1.*")).stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    write_store(tmp_path / "whole", sample_images(11, (5,)), SPEC)
    assert tree(path) == tree(tmp_path / "whole")
    assert verify(path).clean


def test_admitting_nothing_changes_nothing(path: Path) -> None:
    before = tree(path)
    admit(path, bad=BAD)
    assert tree(path) == before
    assert read_root(path).earlier == ()


def changed(images: ImageTable, place: int, **fields: object) -> ImageTable:
    columns = {name: list(getattr(images, name)) for name in fields}
    for name, value in fields.items():
        columns[name][place] = value
    return replace(images, **{name: tuple(column) for name, column in columns.items()})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (changed(sample_images(11, (5,)), 2, sha256="f" * 64), "sha256, image 2"),
        (sample_images(11, (1, 5, 7)), "statuses, image 7"),
        (changed(sample_images(11, (5,)), 5, statuses="another reason"), "statuses, image 5"),
        (sample_images(12), "1 images not in the store"),
        (sample_images(10), "1 images only in the store"),
    ],
    ids=["content", "newly bad", "reason", "more", "fewer"],
)
def test_any_other_change_is_refused(path: Path, images: ImageTable, message: str) -> None:
    before = tree(path)
    with pytest.raises(StoreMismatchError, match=message):
        admit_images(path, images, sample_views(len(images)))
    assert tree(path) == before


def test_views_of_other_images_must_stay(path: Path) -> None:
    views = sample_views(11)
    views.boxes[1] += 1  # of an image that is admitted
    moved = sample_views(11)
    moved.boxes[2] += 1
    for wrong in (moved, replace(views, image_size=(24, 33))):
        with pytest.raises(StoreMismatchError, match="views of images that were not quarantined"):
            admit_images(path, sample_images(11, (5,)), wrong)
    admit_images(path, sample_images(11, (5,)), views)
    extract(path)
    assert FeatureStore(path).views == views


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_order_of_admitting_appending_and_extracting(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("store") / "store"
    views = data.draw(st.sampled_from([1, 2]))
    count, bad = 3, {1}
    write_store(path, sample_images(count, sorted(bad)), SPEC, views_per_image=views)
    for _ in range(data.draw(st.integers(1, 5))):
        match data.draw(st.sampled_from(["admit", "append", "extract"])):
            case "admit":
                bad -= set(data.draw(st.lists(st.sampled_from(range(count)), max_size=3)))
                admit(path, tuple(bad), count, views)
            case "append":
                more = data.draw(st.integers(1, 4))
                bad |= set(data.draw(st.lists(st.integers(count, count + more - 1), max_size=2)))
                count += more
                append_images(
                    path, sample_images(count, sorted(bad)), sample_views(count * views, views)
                )
            case "extract":
                extract(path)
    extract(path)
    store = FeatureStore(path)
    rows = np.flatnonzero([row // views not in bad for row in range(count * views)])
    assert np.flatnonzero(store.valid("small")).tolist() == rows.tolist()
    for level in store.levels("small"):
        expected = np.concatenate(
            [sample_features(SPEC, range(row, row + 1))[level] for row in rows]
        )
        np.testing.assert_array_equal(store.read("small", level, rows), expected.astype(np.float16))
    assert verify(path).clean


def test_a_teacher_of_other_images_is_still_a_stranger(path: Path, tmp_path: Path) -> None:
    other = sample_images(11, BAD)
    write_store(tmp_path / "other", changed(other, 3, sha256="e" * 64), SPEC)
    shutil.rmtree(path / "small")
    shutil.copytree(tmp_path / "other" / "small", path / "small")
    admit(path)
    with pytest.raises(StoreMismatchError, match="extracted differently"):
        extract(path)
    with pytest.raises(StoreMismatchError, match="for other images or views"):
        FeatureStore(path).read("small", "stage_1", [0])


def test_a_writer_that_was_open_is_caught_up_with(path: Path) -> None:
    with FeatureWriter.open(path, SPEC, FOUR_ROWS) as writer:
        admit(path)
        writer.finish()
    assert FeatureStore(path).unfinished == ("small",)
    assert len(extract(path)) == 3


def test_a_shard_begun_before_its_image_was_let_in_is_not_committed(tmp_path: Path) -> None:
    path, valid = tmp_path / "store", np.array([row != 1 for row in range(8)])
    create_store(path, sample_images(8, (1,)), sample_views(8))
    with FeatureWriter.open(path, SPEC, FOUR_ROWS) as before:
        assert before.claim(range(4))
        write_rows(before, SPEC, range(2), valid)
        admit_images(path, sample_images(8), sample_views(8))
        with FeatureWriter.open(path, SPEC, FOUR_ROWS) as after:
            with pytest.raises(StoreMismatchError, match="run the same command again"):
                write_rows(before, SPEC, range(2, 4), valid)
            before.close()
            for rows in after.missing():
                write_rows(after, SPEC, rows)
            after.finish()
    assert FeatureStore(path).valid("small").all()
    assert verify(path).clean


def test_index_is_told_to_admit(path: Path) -> None:
    with pytest.raises(StoreMismatchError, match=r"2 quarantined .*--retry-quarantined` lets"):
        create_store(path, sample_images(11, (5,)), sample_views(11))


def test_entries_by_id() -> None:
    stored = sample_images(4, (1, 2))
    assert admitted(stored, sample_images(3, (2,)).take([2, 1])) == sample_images(4, (2,))
    today = changed(sample_images(5, (2, 3)), 2, statuses="the server answers 500")
    assert with_stored_reasons(today, stored) == sample_images(5, (2, 3))


def test_there_is_no_store_yet(tmp_path: Path) -> None:
    assert stored_images(tmp_path / "store") is None
    with pytest.raises(StoreError, match="no feature store"):
        admit(tmp_path / "store")


@pytest.mark.parametrize("earlier", [None, 3, [3], [{"rows": "many"}]])
def test_damaged_memory_of_earlier_states(path: Path, earlier: object) -> None:
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["earlier"] = earlier
    (path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreDamagedError):
        FeatureStore(path)


KILLED = """
import sys
import numpy as np
from store.admit import admit_images
from store.testing import *
from store.writer import FeatureWriter
spec = sample_teacher()

def run(path):
    admit_images(path, sample_images(11, (5,)), sample_views(11))
    with FeatureWriter.open(path, spec) as writer:
        for rows in writer.missing():
            write_rows(writer, spec, rows, np.arange(11) != 5)
        writer.finish()
"""


def seen_by_a_reader(path: Path) -> str:
    """Say how many rows a reader finds, all of them right, or which command is to be run."""
    try:
        store = FeatureStore(path)
        rows = np.flatnonzero(store.valid("small"))
        expected = np.concatenate(
            [sample_features(SPEC, range(row, row + 1))["stage_1"] for row in rows]
        )
        np.testing.assert_array_equal(
            store.read("small", "stage_1", rows), expected.astype(np.float16)
        )
        return str(len(rows))
    except StoreError as error:
        return str(error).partition("; run `")[2].partition("`")[0]


def test_killed_at_any_moment_of_admitting_and_extracting(path: Path, tmp_path: Path) -> None:
    step = 13
    command = [sys.executable, "-c", KILLED + KILL_LOOP, str(tmp_path), str(step)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    write_store(tmp_path / "whole", sample_images(11, (5,)), SPEC)
    whole = tree(tmp_path / "whole")
    states = set()
    kept = next((path / "small" / "stage_1" / "native").glob("c.1.*")).stat().st_mtime_ns
    for moment in range(1, int(done.stdout), step):
        killed = tmp_path / str(moment) / "store"
        states.add(seen_by_a_reader(killed))
        admit(killed, bad=(5,))
        extract(killed)
        assert tree(killed) == whole
        assert [entry.name for entry in killed.parent.iterdir()] == ["store"]
        untouched = next((killed / "small" / "stage_1" / "native").glob("c.1.*"))
        assert untouched.stat().st_mtime_ns == kept
    assert states >= {"8", "sak index --append", "sak extract-teachers small"}
    assert states <= {
        "8", "10", "sak index --append", "sak extract-teachers small", "sak extract-teachers",
    }  # fmt: skip


def test_a_store_in_a_bucket(s3_endpoint: str) -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket="admit")
    url = "s3://admit/features.zarr"
    write_store(url, sample_images(6, (1,)), SPEC)
    assert stored_images(url) == sample_images(6, (1,))
    admit_images(url, sample_images(6), sample_views(6))
    assert FeatureStore(url).unfinished == ("small",)
    with FeatureWriter.open(url, SPEC, FOUR_ROWS) as writer:
        assert writer.missing() == [range(4)]
        write_rows(writer, SPEC, range(4))
        writer.finish()
    assert FeatureStore(url).valid("small").all()
