"""Stores on object storage: the same bytes as a folder, the same refusals, and one writer."""

import gc
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import dask.array
import fsspec
import numpy as np
import pytest
import xarray
import zarr
from fsspec.asyn import sync_wrapper
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from s3fs import S3FileSystem
from upath import UPath

from store import lease, remote_shards, streams
from store.errors import (
    StoreDamagedError,
    StoreError,
    StoreFormatError,
    StoreLockedError,
    StoreMismatchError,
    UnfinishedStoreError,
)
from store.files import lock_folder
from store.inspect import open_dask, open_xarray, summarise
from store.reader import FeatureStore
from store.remote import locate
from store.shard import ShardWriter
from store.spec import GLOBAL, LevelSpec, TeacherSpec
from store.teacher_layout import TeacherLayout
from store.testing import (
    sample_features,
    sample_images,
    sample_shard_bytes,
    sample_teacher,
    sample_views,
    write_rows,
    write_store,
)
from store.writer import FeatureWriter, create_store

SPEC = sample_teacher()
ROWS = 11
SHARD_BYTES = sample_shard_bytes(SPEC, 4)
LARGE = TeacherSpec(  # four rows of its first level are more than the 5 MiB of a part
    name="large",
    levels=(
        LevelSpec(name="block", grid=(32, 32), channels=768),
        LevelSpec(name="late", grid=(2, 2), channels=8),
    ),
    global_channels=None,
    provenance={"model": "large", "weights_sha256": "ab" * 32},
)


@pytest.fixture(scope="module")
def bucket(s3_endpoint: str) -> str:
    boto3.client("s3").create_bucket(Bucket="features")
    return "s3://features"


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/{uuid.uuid4().hex}/store.zarr"


@pytest.fixture
def memory() -> Iterator[str]:
    yield f"memory://{uuid.uuid4().hex}/store.zarr"
    MemoryFileSystem.store.clear()


@pytest.fixture(scope="module")
def stored(bucket: str) -> str:
    """A finished store that no test may change."""
    url = f"{bucket}/read-only/store.zarr"
    write_store(url, sample_images(ROWS, quarantined=[7]), SPEC)
    return url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store in a folder."""
    path = tmp_path_factory.mktemp("local") / "store.zarr"
    write_store(path, sample_images(ROWS, quarantined=[7]), SPEC)
    return path


def hashes(path: str | Path) -> dict[str, str]:
    """SHA-256 of each object below a URL, or file below a folder, by its relative name."""
    root = locate(path) if "://" in str(path) else UPath(path)
    names = root.fs.find(root.path)
    found = root.fs.cat_ranges(names, [0] * len(names), [None] * len(names), on_error="raise")
    return {
        name.removeprefix(root.path): hashlib.sha256(data).hexdigest()
        for name, data in zip(names, found, strict=True)
    }


def features(component: str) -> np.ndarray:
    values = sample_features(SPEC, range(ROWS))[component.removesuffix("/native")]
    values = values.astype(np.float16)
    values[7] = 0
    return values


def test_bucket_holds_the_very_files_of_a_folder(stored: str, folder: Path) -> None:
    assert hashes(stored) == hashes(folder)


def test_summary_is_that_of_a_folder(stored: str, folder: Path) -> None:
    there, here = summarise(stored).to_json(), summarise(folder).to_json()
    assert there.pop("path") == stored
    assert here.pop("path") == str(folder)
    assert there == here


@pytest.mark.parametrize("level", ["stage_1", "stage_2", GLOBAL])
def test_rows_of_one_call_are_read_at_the_same_time(
    stored: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = S3FileSystem._cat_ranges

    async def counted(self: S3FileSystem, paths: list[str], *arguments: Any, **options: Any) -> Any:
        calls.append(len(paths))
        return await real(self, paths, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_cat_ranges", counted)
    # An instance binds its methods when it is made: a new option makes a new instance.
    store = FeatureStore(UPath(stored, max_concurrency=20 + len(level) + int(level[-1] == "2")))
    rows = [10, 0, 4, 4, 9]
    np.testing.assert_array_equal(store.read("small", level, rows), features(level)[rows])
    assert calls == [3, 5]  # the indexes of three shards, then five rows
    np.testing.assert_array_equal(store.read("small", level, [1, 5]), features(level)[[1, 5]])
    assert calls == [3, 5, 2]
    assert store.read("small", level, []).shape == (0, *features(level).shape[1:])
    with pytest.raises(StoreError, match="quarantined"):
        store.read("small", level, [7])


@given(
    rows=st.lists(st.integers(0, 8), max_size=12),
    count=st.integers(9, 14),
    per_shard=st.integers(1, 9),
)
@settings(max_examples=8, deadline=None)
def test_any_rows_of_any_cut_read_back(rows: list[int], count: int, per_shard: int) -> None:
    url = f"memory://{uuid.uuid4().hex}/store.zarr/"
    write_store(url, sample_images(count), SPEC, rows_per_shard=per_shard)
    expected = sample_features(SPEC, range(count))["stage_1"].astype(np.float16)
    np.testing.assert_array_equal(FeatureStore(url).read("small", "stage_1", rows), expected[rows])
    MemoryFileSystem.store.clear()


def test_statistics_tables_and_marks_are_those_of_a_folder(stored: str, folder: Path) -> None:
    there, here = FeatureStore(stored), FeatureStore(folder)
    assert there.images == here.images
    assert there.digest() == here.digest()
    assert there.views.digest() == here.views.digest()
    np.testing.assert_array_equal(there.valid("small"), here.valid("small"))
    mean = there.statistics("small", "stage_2").mean
    np.testing.assert_array_equal(mean, here.statistics("small", "stage_2").mean)


@pytest.mark.parametrize("component", ["stage_1/native", "stage_2/native", GLOBAL])
def test_zarr_and_dask_read_the_same(stored: str, component: str) -> None:
    files = zarr.storage.FsspecStore.from_url(stored, read_only=True)
    array = zarr.open_array(files, path=f"small/{component}", mode="r")
    np.testing.assert_array_equal(array[...], features(component))
    np.testing.assert_array_equal(array[6:9], features(component)[6:9])
    lazy = dask.array.from_zarr(stored, component=f"small/{component}")
    np.testing.assert_array_equal(lazy.compute(), features(component))


def test_lazy_views_read_the_same(stored: str) -> None:
    lazy = open_dask(stored, "small", "stage_1")
    assert lazy.chunks[0] == (4, 4, 3)
    np.testing.assert_array_equal(lazy.compute(), features("stage_1"))
    data = open_xarray(stored, "small")
    assert data["image"].values.tolist() == list(sample_images(ROWS).ids)
    np.testing.assert_array_equal(data["stage_2"].values, features("stage_2"))
    plain = xarray.open_zarr(stored, group="small/stage_1", consolidated=False)
    np.testing.assert_array_equal(plain["native"].values, features("stage_1"))


def test_store_is_picklable_and_takes_options(stored: str, s3_endpoint: str) -> None:
    path = UPath(stored, client_kwargs={"endpoint_url": s3_endpoint})
    for store in (FeatureStore(stored), FeatureStore(path)):
        store.read("small", "stage_1", [0])
        copy = pickle.loads(pickle.dumps(store))
        np.testing.assert_array_equal(copy.read("small", "stage_1", [2]), features("stage_1")[[2]])
    lazy = open_dask(path, "small", "stage_1")
    np.testing.assert_array_equal(lazy[3].compute(), features("stage_1")[3])


FORKED = """
import os, sys
import numpy as np
from store.reader import FeatureStore
store = FeatureStore(sys.argv[1])
before = store.read("small", "stage_1", [0, 5])
child = os.fork()
if child == 0:
    same = np.array_equal(store.read("small", "stage_1", [0, 5]), before)
    other = store.read("small", "stage_2", [8]).shape == (1, 2, 2, 8)
    os._exit(0 if same and other else 3)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(store.read("small", "stage_1", [0, 5]), before)
"""


def test_a_forked_worker_reads(stored: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, stored], check=False, capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("offset", [0, 100, 147, -5, -1])
def test_flipped_byte_of_a_shard_is_named(memory: str, offset: int) -> None:
    write_store(memory, sample_images(5), SPEC)
    shard = UPath(memory) / "small/stage_1/native/c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[offset] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(StoreDamagedError, match=r"c\.0\.0\.0\.0 is damaged.*extract-teachers"):
        FeatureStore(memory).read("small", "stage_1", [4, 0])


def test_lost_and_cut_shards_are_refused_and_computed_again(memory: str) -> None:
    write_store(memory, sample_images(6), SPEC)
    whole = hashes(memory)
    shard = UPath(memory) / "small/stage_1/native/c.0.0.0.0"
    data = shard.read_bytes()
    for change in (data[:3], data[:-1], data + b"\0"):
        shard.write_bytes(change)
        with pytest.raises(StoreDamagedError, match=f"should have {len(data)} bytes, it has"):
            FeatureStore(memory).read("small", "stage_1", [1])
    shard.unlink()
    with pytest.raises(StoreDamagedError, match=r"c\.0\.0\.0\.0 is missing from the store"):
        FeatureStore(memory).read("small", "stage_1", [5, 1])
    with FeatureWriter.open(memory, SPEC) as writer:
        assert writer.missing() == [range(4)]
        write_rows(writer, SPEC, range(4))
        with pytest.raises(UnfinishedStoreError):
            FeatureStore(memory).valid("small")
        writer.finish()
    assert hashes(memory) == whole


def test_shard_cut_short_on_s3_is_named(url: str) -> None:
    write_store(url, sample_images(5), SPEC)
    (UPath(url) / "small/stage_1/native/c.0.0.0.0").write_bytes(b"abc")
    (UPath(url) / "small/stage_2/native/c.0.0.0.0").unlink()
    store = FeatureStore(url)
    with pytest.raises(StoreDamagedError, match=r"c\.0\.0\.0\.0 is damaged: it should have"):
        store.read("small", "stage_1", [0])
    with pytest.raises(StoreDamagedError, match=r"c\.0\.0\.0\.0 is missing from the store"):
        store.read("small", "stage_2", [4, 0])


KILLED = """
import json, os, signal, sys
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from store import streams
from store.testing import *
from store.spec import (TeacherSpec)
spec = TeacherSpec.from_attributes(json.loads(sys.argv[1]))

def run(url, method, name):
    real = S3FileSystem._call_s3
    async def call(self, called, *arguments, **options):
        answer = await real(self, called, *arguments, **options)
        if called == method and name in options.get("Key", ""):
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    S3FileSystem._call_s3 = call
    S3FileSystem.call_s3 = sync_wrapper(call)
    streams._PART_BYTES = 5 * 2**20  # two parts a shard
    write_store(url, sample_images(5), spec, rows_per_shard=4)

for url, method, name in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        run(url, method, name)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""
MOMENTS = {
    "first table": ("put_object", "images/id/c.0"),
    "half of the first shard": ("upload_part", "block/native/c.0"),
    "one file of the first shard": ("complete_multipart_upload", "block/native/c.0"),
    "between shards": ("put_object", "valid/c.0"),
}


def test_killed_writer_leaves_no_torn_shard_and_resumes(bucket: str, tmp_path: Path) -> None:
    write_store(tmp_path / "whole", sample_images(5), LARGE, rows_per_shard=4)
    whole = hashes(tmp_path / "whole")
    urls = {moment: f"{bucket}/killed/{number}/store.zarr" for number, moment in enumerate(MOMENTS)}
    kills = json.dumps([(urls[moment], *when) for moment, when in MOMENTS.items()])
    command = [sys.executable, "-c", KILLED, json.dumps(LARGE.to_attributes()), kills]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(MOMENTS), done.stderr
    for moment, url in urls.items():
        left = hashes(url)
        chunks = {name for name in left if "/c." in name}
        assert not {name for name in chunks if left[name] != whole[name]}, moment
        # Of who makes the store; later of the writer, and of the shard that it is at.
        leases = [name for name in left if "/.lease-" in name]
        assert len(leases) == (1 if moment == "first table" else 2), moment
        if "/large/zarr.json" in left:
            (teacher,) = summarise(url).teachers
            assert not teacher.finished, moment
            assert teacher.coverage == pytest.approx(sum((4, 1)[int(name[-1])] for name in chunks
                                                 if "/valid/c." in name) / 5)  # fmt: skip
        write_store(url, sample_images(5), LARGE, rows_per_shard=4)
        assert hashes(url) == whole, moment
    halved = unfinished_uploads(urls["half of the first shard"])
    assert halved == ["large/block/native/c.0.0.0.0"]  # for the bucket's lifecycle rule


def unfinished_uploads(url: str) -> list[str]:
    name, key = url.removeprefix("s3://").split("/", 1)
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=name).get("Uploads", [])
    keys = [upload["Key"] for upload in uploads]
    return sorted(name.removeprefix(f"{key}/") for name in keys if name.startswith(f"{key}/"))


def test_failed_upload_drops_its_shard_only(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: S3FileSystem, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "complete_multipart_upload":
            raise PermissionError("Access Denied")
        return await S3FileSystem._call_s3(self, method, *arguments, **options)

    monkeypatch.setattr(streams, "_PART_BYTES", 5 * 2**20)
    create_store(url, sample_images(5), sample_views(5))
    with FeatureWriter.open(url, LARGE, sample_shard_bytes(LARGE, 4)) as writer:
        write_rows(writer, LARGE, range(4, 5))
        with monkeypatch.context() as patch:
            patch.setattr(S3FileSystem, "call_s3", sync_wrapper(refuse))
            with pytest.raises(StoreError, match=r"Access Denied; check credentials and perm"):
                write_rows(writer, LARGE, range(4))
        assert unfinished_uploads(url) == []
        write_rows(writer, LARGE, range(3))  # and dropped half-way by leaving
        assert unfinished_uploads(url) == []
    with FeatureWriter.open(url, LARGE) as writer:
        assert writer.missing() == [range(4)]
    names = hashes(url)
    assert "/large/block/native/c.0.0.0.0" not in names
    assert not [name for name in names if ".lease" in name]


@pytest.mark.parametrize("end", ["discard", "forget"])
def test_shard_shows_only_once_placed(url: str, end: str) -> None:
    folder = locate(url)
    layout = TeacherLayout(spec=SPEC, rows=ROWS, rows_per_shard=4).features()["stage_1/native"]
    shown = folder / layout.file_path(0)
    values = features("stage_1")[:4]
    writer = ShardWriter(folder, layout, 0)
    writer.append(values[:1])
    writer.append(values[1:])
    assert not shown.exists()
    if end == "discard":
        writer.discard()
    del writer
    gc.collect()
    assert not shown.exists()
    writer = ShardWriter(folder, layout, 0)
    writer.append(values[:1])
    writer.append(values[1:])
    writer.seal()
    writer.place()
    writer.discard()
    assert shown.stat().st_size == layout.file_bytes(0)


def test_offsets_that_are_not_kept_are_asked_for_again(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(memory, sample_images(ROWS), SPEC, rows_per_shard=2)
    monkeypatch.setattr(remote_shards, "_INDEXES", 2)
    store = FeatureStore(memory)
    expected = sample_features(SPEC, range(ROWS))["stage_1"].astype(np.float16)
    for rows in ([0, 2, 4, 6, 8, 10], [1, 3], [9, 0]):
        np.testing.assert_array_equal(store.read("small", "stage_1", rows), expected[rows])


def test_second_writer_of_a_shard_is_refused_and_leaves_the_first_alone(memory: str) -> None:
    create_store(memory, sample_images(6), sample_views(6))
    with FeatureWriter.open(memory, SPEC, SHARD_BYTES) as writer:
        write_rows(writer, SPEC, range(2))
        with pytest.raises(StoreLockedError, match=f"writing .*small: process {os.getpid()} on"):
            lock_folder(locate(memory) / "small")  # as gc and repair do
        with FeatureWriter.open(memory, SPEC) as other:
            assert not other.claim(range(4))
            with pytest.raises(StoreLockedError, match=r"writing range\(0, 4\) of .*small"):
                write_rows(other, SPEC, range(4))
            write_rows(other, SPEC, range(4, 6))
        with FeatureWriter.open(memory, sample_teacher("second")):
            pass  # another teacher is another lease
        write_rows(writer, SPEC, range(2, 4))
        writer.finish()
    FeatureWriter.open(memory, SPEC).close()
    assert not [name for name in hashes(memory) if ".lease" in name]


def foreign_lease(url: str, **holder: object) -> None:
    (UPath(url) / ".lease-0123").write_bytes(json.dumps(holder).encode())


def test_writer_of_another_machine_is_believed_until_its_lease_ends(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_store(memory, sample_images(6), sample_views(6))
    foreign_lease(f"{memory}/small", host="far", machine="far", process=1)
    with pytest.raises(StoreLockedError, match="process 1 on far"):
        FeatureWriter.open(memory, SPEC)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.0)
    with FeatureWriter.open(memory, SPEC) as writer:
        assert writer.missing() == [range(6)]
        names = [path.name for path in (UPath(memory) / "small").glob(".lease-*")]
        assert len(names) == 1
        assert names != [".lease-0123"]


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b'{"process": -1, "machine": "x"}'])
def test_unreadable_lease_is_a_lease(memory: str, body: bytes) -> None:
    create_store(memory, sample_images(6), sample_views(6))
    (UPath(memory) / "small/.lease-0123").write_bytes(body)
    with pytest.raises(StoreLockedError):
        FeatureWriter.open(memory, SPEC)


def test_writer_whose_lease_was_taken_over_does_not_commit(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_store(memory, sample_images(6), sample_views(6))
    with FeatureWriter.open(memory, SPEC, SHARD_BYTES) as writer:
        for path in (UPath(memory) / "small").glob(".lease-*"):
            path.unlink()
        monkeypatch.setattr(lease, "LEASE_SECONDS", 0.0)
        with pytest.raises(StoreLockedError, match=r"stood still .* run the same command again"):
            write_rows(writer, SPEC, range(4))
        assert writer.missing() == [range(4), range(4, 6)]
    assert not (UPath(memory) / "small/valid/c.0").exists()


def test_two_makers_of_a_store_are_refused(memory: str) -> None:
    foreign_lease(memory, host="far", machine="far", process=1)
    with pytest.raises(StoreLockedError, match="process 1 on far"):
        create_store(memory, sample_images(6), sample_views(6))
    with pytest.raises(StoreFormatError, match=r"has no zarr\.json"):
        FeatureStore(memory)


def test_other_images_and_foreign_objects_are_refused(memory: str) -> None:
    create_store(memory, sample_images(6), sample_views(6))
    create_store(memory, sample_images(6), sample_views(6))
    with pytest.raises(StoreMismatchError, match="images: store has 6, asked for 7"):
        create_store(memory, sample_images(7), sample_views(7))
    other = memory.replace("store.zarr", "other")
    (UPath(other) / "notes.txt").write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"'notes\.txt', which is no part of a feature store"):
        create_store(other, sample_images(6), sample_views(6))


def test_no_bucket_is_said_so(s3_endpoint: str) -> None:
    with pytest.raises(StoreError, match=r"there is no feature store at s3://nowhere/x\.zarr"):
        FeatureStore("s3://nowhere/x.zarr")
    with pytest.raises(StoreError, match=r"cannot be written: .*; create the bucket first"):
        create_store("s3://nowhere/x.zarr", sample_images(6), sample_views(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": None}, r"redentials.*AWS_ACCESS_KEY_ID and AWS_SECRET"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, r"127\.0\.0\.1:9.*check the network"),
    ],
)
def test_no_credentials_and_no_network_are_said_so(
    stored: str,
    change: dict[str, str | None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name, value in change.items():
        monkeypatch.delenv(name)
        if value is not None:
            monkeypatch.setenv(name, value)
    fresh = UPath(stored, max_concurrency=40 + len(message))  # looks at the environment anew
    for call in (FeatureStore, summarise):
        with pytest.raises(StoreError, match=message):
            call(fresh)
    with pytest.raises(StoreError, match=message):
        create_store(fresh, sample_images(ROWS), sample_views(ROWS))


def test_missing_packages_and_strange_addresses_are_said_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(StoreError, match="needs gcsfs, which is not installed: pip install gcsfs"):
        FeatureStore("gs://bucket/x.zarr")
    with pytest.raises(StoreError, match=r"no address of a store: .*gopher"):
        FeatureStore("gopher://bucket/x.zarr")
    with pytest.raises(StoreError, match=r"lost a slash: pass it as text, 's3://\.\.\.'"):
        FeatureStore(Path("s3://bucket/x.zarr"))

    def missing(protocol: str) -> type:
        raise ImportError("Please install s3fs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(StoreError, match=r"pip install 'sak-distill\[s3\]'"):
        FeatureStore("s3://bucket/x.zarr")


def test_faults_of_ours_are_not_dressed_up(memory: str) -> None:
    path = locate(memory)
    assert isinstance(path, UPath)
    with pytest.raises(TypeError):
        path.fs.info(1, 2, 3)


def test_folders_stay_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("x.zarr") == tmp_path / "x.zarr"
    assert locate(tmp_path / "x:y") == tmp_path / "x:y"
    assert locate(f"file://{tmp_path}/x.zarr") == tmp_path / "x.zarr"
    assert type(locate(UPath(tmp_path / "x.zarr"))) is type(tmp_path)
    assert str(locate("s3://bucket/x.zarr/")) == "s3://bucket/x.zarr"
