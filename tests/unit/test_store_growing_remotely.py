"""Append and gc on object storage, which has no renames: interrupted after any request."""

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from store.append import append_images, in_stored_order
from store.collect import collect_garbage
from store.create import create_store
from store.errors import StoreError, StoreMismatchError
from store.files import lock_folder
from store.reader import FeatureStore
from store.remote import locate
from store.testing import (
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


@pytest.fixture
def memory() -> Iterator[str]:
    yield f"memory://{uuid.uuid4().hex}/store.zarr"
    MemoryFileSystem.store.clear()


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    name = f"growing-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


def hashes(url: str | Path) -> dict[str, str]:
    """SHA-256 of each object but the leases, by its relative name."""
    if isinstance(url, Path):
        files = [file for file in url.rglob("*") if file.is_file()]
        return {
            str(file.relative_to(url)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
        }
    root = locate(url)
    assert not isinstance(root, Path)
    path = root.path.rstrip("/")
    return {
        name.removeprefix(f"{path}/"): hashlib.sha256(root.fs.cat_file(name)).hexdigest()
        for name in root.fs.find(path)
        if "/.lease-" not in name
    }


def grow(url: str, count: int) -> None:
    append_images(url, sample_images(count), sample_views(count))


def extract(url: str) -> None:
    with FeatureWriter.open(url, SPEC, sample_shard_bytes(SPEC, 4)) as writer:
        for rows in writer.missing():
            write_rows(writer, SPEC, rows)
        writer.finish()


def test_a_bucket_grows_to_the_files_of_a_folder(bucket: str, tmp_path: Path) -> None:
    write_store(bucket, sample_images(6), SPEC)  # the bucket itself is the store
    early = FeatureStore(bucket)
    assert in_stored_order(bucket, sample_images(9).take([8, *range(8)])).ids[-1].startswith("room")
    grow(bucket, 9)
    assert FeatureStore(bucket).unfinished == ("small",)
    with FeatureWriter.open(bucket, SPEC) as writer:
        assert writer.missing() == [range(4, 8), range(8, 9)]
    extract(bucket)
    write_store(tmp_path / "whole", sample_images(9), SPEC)
    assert hashes(bucket) == hashes(tmp_path / "whole")
    with pytest.raises(StoreMismatchError, match="open it again"):
        early.read("small", "stage_1", [5])
    (dropped,) = collect_garbage(bucket, drop=["small"])
    assert (dropped.busy, dropped.bytes > 1000) == (False, True)
    assert FeatureStore(bucket).teachers
    assert collect_garbage(bucket, drop=["small"], delete=True) == [dropped]
    create_store(tmp_path / "empty", sample_images(9), sample_views(9))
    assert hashes(bucket) == hashes(tmp_path / "empty")


class Stopped(BaseException):
    """Stands for a kill: every further request fails likewise, but for those of the lease."""


@contextmanager
def killed_after(requests: int) -> Iterator[list[str]]:
    """Give the requests that were made."""
    made: list[str] = []

    def counted(name: str) -> Any:
        real = getattr(MemoryFileSystem, name)

        def call(self: Any, path: Any, *arguments: Any, **options: Any) -> Any:
            if ".lease-" not in str(path):
                if len(made) == requests:
                    raise Stopped
                made.append(f"{name} {path}")
            return real(self, path, *arguments, **options)

        return call

    names = ("pipe_file", "cp_file", "rm_file", "rm")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(MemoryFileSystem, name, counted(name)))
        stack.enter_context(mock.patch("store.swap.each", one_by_one))
        stack.enter_context(suppress(Stopped))
        yield made


def one_by_one(folder: Any, function: Any, items: Any) -> list[Any]:
    return [function(item) for item in items]


def state(url: str) -> str:
    """Say what a reader finds: so many images, or which command is to be run."""
    try:
        store = FeatureStore(url)
        assert len(store.images) == len(store.views) == store.rows
        if "small" in store.teachers:
            found = store.read("small", "stage_1", range(store.rows))
            values = sample_features(SPEC, range(store.rows))["stage_1"].astype(np.float16)
            np.testing.assert_array_equal(found, values)
        return str(store.rows)
    except StoreError as error:
        return str(error).partition("; run `")[2].partition("`")[0]


def test_an_append_killed_after_any_request_is_completed(memory: str, tmp_path: Path) -> None:
    write_store(tmp_path / "whole", sample_images(9), SPEC)
    whole = hashes(tmp_path / "whole")
    write_store(memory, sample_images(6), SPEC)
    before = dict(MemoryFileSystem.store)
    states = []
    for requests in range(0, 1000, 9):
        MemoryFileSystem.store.clear()
        MemoryFileSystem.store.update(before)
        with killed_after(requests) as made:
            grow(memory, 9)
        states.append(state(memory))
        if requests % 2:
            found = collect_garbage(memory, delete=True)
            assert all(not one.busy and one.path.name == ".ready" for one in found)
            assert collect_garbage(memory) == []
        grow(memory, 9)
        assert state(memory) == "9"
        if len(made) < requests:
            break
    assert [key for key, _ in groupby(states)] == ["6", "sak index --append", "9"]
    extract(memory)
    assert hashes(memory) == whole


def test_a_dropped_teacher_killed_after_any_request_is_none_and_goes_on(memory: str) -> None:
    write_store(memory, sample_images(6), SPEC)
    before = dict(MemoryFileSystem.store)
    for requests in range(2, 1000, 13):
        MemoryFileSystem.store.clear()
        MemoryFileSystem.store.update(before)
        with killed_after(requests) as made, mock.patch("store.collect.each", one_by_one):
            collect_garbage(memory, drop=["small"], delete=True)
        assert not FeatureStore(memory).teachers
        if len(made) < requests:
            break
        (left,) = collect_garbage(memory, delete=True)
        assert left.path.name == "small"
        assert not [name for name in MemoryFileSystem.store if "/small/" in name]
        assert collect_garbage(memory) == []


def test_what_is_being_written_stays(memory: str) -> None:
    write_store(memory, sample_images(6), SPEC)
    before = hashes(memory)
    writer = lock_folder(locate(memory) / "small")
    (found,) = collect_garbage(memory, drop=["small"], delete=True)
    writer.release()
    assert found.busy
    assert hashes(memory) == before
