"""Arrays that another tool wrote anew: read as they were, by what suits them, or refused."""

import gc
import gzip
import json
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import boto3
import numcodecs
import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)

from store.chunks import checksum
from store.errors import StoreDamagedError
from store.local_shards import Verify
from store.reader import FeatureStore
from store.testing import sample_features, sample_images, sample_teacher, write_store
from store.zarr_rows import open_zarr

ROWS = 11
SPEC = sample_teacher()
EXPECTED = sample_features(SPEC, range(ROWS))["stage_1"].astype(np.float16)
ARRAY = "stage_1/native"
SHARD = f"small/{ARRAY}/c.0.0.0.0"
ROW = (1, 3, 4, 6)
DOTTED = {"name": "default", "separator": "."}


def sharded(*steps: Any, rows: int = 4, start: bool = False, names: Any = None) -> dict[str, Any]:
    """Return how to write shards of rows that go through `steps`."""
    sharding = ShardingCodec(
        chunk_shape=ROW,
        codecs=[BytesCodec(), *steps],
        index_location="start" if start else "end",
    )
    return {
        "chunks": (rows, *ROW[1:]),
        "serializer": sharding,
        "compressors": None,
        "chunk_key_encoding": names or DOTTED,
    }


def plain(*steps: Any, chunks: tuple[int, ...] = ROW, filters: Any = None) -> dict[str, Any]:
    return {"chunks": chunks, "compressors": steps or None, "filters": filters}


KNOWN: dict[str, dict[str, Any]] = {
    "zstd, crc32c": sharded(ZstdCodec(level=3), Crc32cCodec()),
    "zstd": sharded(ZstdCodec()),
    "blosc, crc32c": sharded(BloscCodec(cname="lz4"), Crc32cCodec()),
    "blosc": sharded(BloscCodec(cname="zstd", shuffle="bitshuffle", typesize=2)),
    "gzip, crc32c": sharded(GzipCodec(), Crc32cCodec()),
    "gzip": sharded(GzipCodec()),
    "no codec": sharded(),
    "index in front": sharded(Crc32cCodec(), start=True),
    "index in front, zstd": sharded(ZstdCodec(), Crc32cCodec(), start=True),
    "longer shards": sharded(Crc32cCodec(), rows=7),
    "names with slashes": sharded(Crc32cCodec(), names={"name": "default", "separator": "/"}),
    "names as in version 2": sharded(Crc32cCodec(), names={"name": "v2", "separator": "."}),
}
OTHER: dict[str, dict[str, Any]] = {
    "no shards": plain(ZstdCodec()),
    "chunks of three rows": plain(BloscCodec(), chunks=(3, *ROW[1:])),
    "chunks that cut rows": plain(GzipCodec(), chunks=(2, 2, 3, 6)),
    "two compressors": sharded(ZstdCodec(), GzipCodec()),
    "transposed": plain(filters=[TransposeCodec(order=(0, 2, 1, 3))]),
    "big-endian": {**plain(), "serializer": BytesCodec(endian="big")},
}


def write_anew(path: str | Path, how: dict[str, Any], array: str = f"small/{ARRAY}") -> None:
    """Have zarr write an array of a store in another way."""
    where = FeatureStore(path).path / array
    old = open_zarr(where)
    values, attributes = old[...], dict(old.attrs)
    with zarr.config.set({"array.write_empty_chunks": True}):
        new = zarr.create_array(
            str(where) if not isinstance(where, Path) else where,
            shape=old.shape,
            dtype=old.dtype,
            fill_value=old.fill_value,
            attributes=attributes,
            dimension_names=old.metadata.dimension_names,  # type: ignore[union-attr]
            overwrite=True,
            **how,
        )
        new[...] = values


def reader_of(store: FeatureStore, level: str = "stage_1", teacher: str = "small") -> str:
    layout = store.array(teacher, level)
    return type(store._rows._arrays[teacher, layout.path]).__name__


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", sample_images(ROWS), SPEC)
    return tmp_path / "store"


def read_all_ways(store: FeatureStore) -> None:
    rows = [7, 2, 2, 10, 0]
    for threads in (None, 1, 3):
        out = np.full((5, *ROW[1:]), np.nan, np.float16)
        store.read_codes_into("small", "stage_1", rows, out, threads=threads)
        np.testing.assert_array_equal(out, EXPECTED[rows])
        wide = np.full(out.shape, np.nan, np.float32)
        store.read_into("small", "stage_1", rows, wide, threads=threads)
        np.testing.assert_array_equal(wide, EXPECTED[rows].astype(np.float32))
    np.testing.assert_array_equal(store.read("small", "stage_1", range(ROWS)), EXPECTED)
    assert store.read("small", "stage_1", []).shape == (0, *ROW[1:])


@pytest.mark.parametrize("form", [*KNOWN, *OTHER])
def test_rows_are_what_they_were(path: Path, form: str) -> None:
    assert reader_of(FeatureStore(path)) == "LocalShards"
    digest = FeatureStore(path).digest()
    write_anew(path, KNOWN.get(form) or OTHER[form])
    for verify in ("once", "always", "never"):
        store = FeatureStore(path, verify)
        assert reader_of(store) == ("CompressedShards" if form in KNOWN else "ZarrRows")
        assert reader_of(store, "stage_2") == "LocalShards"
        read_all_ways(store)
    assert store.digest() == digest


@pytest.mark.parametrize("codec", ["int8", "int8-pca4", "pca-4bit"])
@pytest.mark.parametrize("form", ["zstd, crc32c", "blosc", "no shards"])
def test_codes_are_decoded_as_before(codec: str, form: str, tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(ROWS), sample_teacher(codec=codec))
    before = FeatureStore(tmp_path).read("small", "stage_1", range(ROWS))
    kept = FeatureStore(tmp_path).array("small", "stage_1").shape[1:]
    how = KNOWN.get(form) or OTHER[form]
    if form in KNOWN:
        inner = how["serializer"].codecs
        how = how | {"chunks": (4, *kept)}
        how["serializer"] = ShardingCodec(chunk_shape=(1, *kept), codecs=inner)
    else:
        how = how | {"chunks": (1, *kept)}
    write_anew(tmp_path, how)
    store = FeatureStore(tmp_path)
    assert reader_of(store) == ("CompressedShards" if form in KNOWN else "ZarrRows")
    np.testing.assert_array_equal(store.read("small", "stage_1", range(ROWS)), before)


@pytest.fixture
def memory() -> Iterator[str]:
    yield f"memory://{uuid.uuid4().hex}/store.zarr"
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize(
    ("kind", "form"),
    [("s3", "zstd, crc32c"), ("memory", "zstd, crc32c"), ("memory", "chunks that cut rows")],
)
def test_object_storage_goes_through_zarr(
    kind: str, form: str, request: pytest.FixtureRequest
) -> None:
    if kind == "s3":
        request.getfixturevalue("s3_endpoint")
        bucket = f"forms-{uuid.uuid4().hex}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        url = f"s3://{bucket}/store.zarr"
    else:
        url = request.getfixturevalue("memory")
    write_store(url, sample_images(ROWS), SPEC)
    assert reader_of(FeatureStore(url)) == "RemoteShards"
    write_anew(url, KNOWN.get(form) or OTHER[form])
    store = FeatureStore(url)
    assert reader_of(store) == "ZarrRows"
    read_all_ways(store)
    if form == "zstd, crc32c":
        shard = store.path / SHARD
        data = bytearray(shard.read_bytes())
        data[20] ^= 1
        shard.write_bytes(bytes(data))
        with pytest.raises(StoreDamagedError, match=r"zarr cannot read its rows: .*checksum"):
            store.read("small", "stage_1", [0, 1, 2, 3])
        shard.unlink()
        with pytest.raises(StoreDamagedError, match="row 3 was never written"):
            store.read("small", "stage_1", [4, 3])


@pytest.mark.parametrize("form", ["zstd, crc32c", "blosc, crc32c", "gzip, crc32c", "no shards"])
def test_flipped_bytes_never_pass_for_features(path: Path, form: str) -> None:
    write_anew(path, KNOWN.get(form) or OTHER[form])
    sealed = form in KNOWN
    file = path / (SHARD if sealed else f"small/{ARRAY}/c/0/0/0/0")
    sound, refused = file.read_bytes(), 0
    for position in np.random.default_rng(0).integers(0, len(sound), 40 if sealed else 4).tolist():
        data = bytearray(sound)
        data[position] ^= 0x10
        file.write_bytes(data)
        try:
            found = FeatureStore(path).read("small", "stage_1", [3, 1, 0, 2])
        except StoreDamagedError:
            refused += 1
        else:  # nothing but a checksum sees the rest
            assert not sealed or np.array_equal(found, EXPECTED[[3, 1, 0, 2]])
    assert refused == 40 or not sealed
    file.write_bytes(sound)
    read_all_ways(FeatureStore(path))


@pytest.mark.parametrize("verify", ["once", "never"])
def test_checksums_are_compared_where_asked(path: Path, verify: Verify) -> None:
    write_anew(path, KNOWN["index in front"])
    file = path / SHARD
    data = bytearray(file.read_bytes())
    data[4 * 16 + 4 + 10] ^= 1  # behind the index, in the first row
    file.write_bytes(data)
    store = FeatureStore(path, verify)
    if verify == "never":
        found = store.read("small", "stage_1", range(4))
        assert (found != EXPECTED[:4]).sum() == 1
        return
    with pytest.raises(StoreDamagedError, match=r"the checksum of its entry \d does not match"):
        store.read("small", "stage_1", range(4))


@pytest.mark.parametrize("compressor", ["zstd", "blosc", "gzip", None])
@pytest.mark.parametrize("change", ["longer", "shorter", "cut", "nothing", "of a megabyte"])
def test_what_does_not_decode_to_a_row_is_refused(
    path: Path, compressor: str | None, change: str
) -> None:
    """Codecs fill as much of a buffer as the data say: too little would leave old numbers."""
    codecs = {"zstd": ZstdCodec(), "blosc": BloscCodec(), "gzip": GzipCodec()}
    steps = [codecs[compressor]] if compressor else []
    write_anew(path, sharded(*steps))
    row = EXPECTED[0].tobytes()
    values = {"longer": row + b"xx", "shorter": row[:-2], "of a megabyte": bytes(2**20)}
    data = encoded(compressor, values.get(change, row))
    data = b"" if change == "nothing" else data[:-3] if change == "cut" else data
    index = np.full((4, 2), 2**64 - 1, "<u8")
    index[0] = 0, len(data)
    (path / SHARD).write_bytes(data + index.tobytes() + checksum(index.tobytes()))
    with pytest.raises(StoreDamagedError, match="its entry 0 does not decode"):
        FeatureStore(path).read("small", "stage_1", [0])
    with pytest.raises(StoreDamagedError, match="its entry 2 was never written"):
        FeatureStore(path).read("small", "stage_1", [2])
    index[0] = 10, 2**63
    (path / SHARD).write_bytes(data + index.tobytes() + checksum(index.tobytes()))
    with pytest.raises(StoreDamagedError, match="places entry 0 outside the file"):
        FeatureStore(path).read("small", "stage_1", [0])


def encoded(compressor: str | None, data: bytes) -> bytes:
    if compressor is None:
        return data
    if compressor == "gzip":
        return gzip.compress(data)
    return bytes({"zstd": numcodecs.Zstd, "blosc": numcodecs.Blosc}[compressor]().encode(data))


@pytest.mark.parametrize("form", ["zstd", "no shards"])
def test_what_is_missing_is_refused_and_not_filled(path: Path, form: str) -> None:
    write_anew(path, KNOWN.get(form) or OTHER[form])
    (path / f"small/{ARRAY}" / ("c.0.0.0.0" if form in KNOWN else "c/0/0/0/0")).unlink()
    with pytest.raises(StoreDamagedError, match="is missing"):
        FeatureStore(path).read("small", "stage_1", [4, 0])
    if form in KNOWN:
        (path / SHARD.replace("c.0", "c.1")).write_bytes(b"too short")
        with pytest.raises(StoreDamagedError, match="its 9 bytes cannot hold an index of 68"):
            FeatureStore(path).read("small", "stage_1", [4])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [12, 3, 4, 6]),
        ("data_type", "float32"),
        ("fill_value", 0),
        ("dimension_names", ["row", "x", "y", "channel"]),
        ("attributes", {"other": 1}),
        ("codecs", "zstd"),
        ("codecs", []),
        ("codecs", [{"name": "sharding_indexed", "configuration": []}]),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [-1, 3, 4, 6]}}),
        ("chunk_key_encoding", {"name": "hilbert"}),
    ],
)
def test_other_metadata_is_refused(path: Path, key: str, value: object) -> None:
    write_anew(path, KNOWN["zstd"])
    file = path / f"small/{ARRAY}/zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(StoreDamagedError, match=r"does not agree with|zarr cannot open it"):
        FeatureStore(path).read("small", "stage_1", [0])


def read_all(store: FeatureStore) -> bytes:
    return store.read("small", "stage_1", range(ROWS)).tobytes()


FORKED = """
import os, sys
from store.reader import FeatureStore
store = FeatureStore(sys.argv[1])
read = lambda: [store.read_codes("small", "stage_1", range(11)).tobytes() for _ in range(20)]
before = read()
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if read() == before else 3)
    children.append(pid)
assert read() == before and not any([os.waitpid(pid, 0)[1] for pid in children])
"""


@pytest.mark.parametrize("form", ["zstd, crc32c", "no shards"])
def test_forked_and_spawned_processes_read_as_well(path: Path, form: str) -> None:
    write_anew(path, KNOWN.get(form) or OTHER[form])
    subprocess.run([sys.executable, "-c", FORKED, str(path)], check=True, timeout=60)
    store = pickle.loads(pickle.dumps(FeatureStore(path)))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        assert processes.submit(read_all, store).result() == EXPECTED.tobytes()


def test_files_are_closed(path: Path) -> None:
    write_anew(path, KNOWN["zstd"])
    store = FeatureStore(path)
    read_all(store)
    assert len(_opened(path)) == 3
    del store
    gc.collect()
    assert _opened(path) == []


def _opened(folder: Path) -> list[str]:
    """Files below a folder that this process has open."""
    links = []
    for entry in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [link for link in links if link.startswith(f"{folder.resolve()}/")]
