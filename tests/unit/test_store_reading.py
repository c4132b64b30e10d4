"""Rows read into a caller's buffers: the rows asked for, in that order, or a refusal."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from store import local_shards
from store.errors import StoreDamagedError, StoreError
from store.local_shards import Verify
from store.reader import FeatureStore
from store.spec import GLOBAL
from store.testing import sample_features, sample_images, sample_teacher, write_store

ROWS = 11
SPEC = sample_teacher()
EXPECTED = {
    name: values.astype(np.float16) for name, values in sample_features(SPEC, range(ROWS)).items()
}
CODECS = ["float32", "int8", "int8-pca4", "pca-4bit"]
SHARD = "small/stage_1/native/c.{}.0.0.0"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of four, four and three rows that no test may change."""
    path = tmp_path_factory.mktemp("reading") / "store"
    write_store(path, sample_images(ROWS), SPEC)
    return path


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of every kind of codec, one level of each at a smaller grid too."""
    path = tmp_path_factory.mktemp("reading") / "store"
    for codec in CODECS:
        write_store(path, sample_images(ROWS), sample_teacher(codec, codec=codec, pyramid=True))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store to damage."""
    write_store(tmp_path / "store", sample_images(ROWS), SPEC)
    return tmp_path / "store"


@given(
    batches=st.lists(st.lists(st.integers(0, ROWS - 1), max_size=9), min_size=1, max_size=6),
    level=st.sampled_from(["stage_1", "stage_2", GLOBAL]),
    verify=st.sampled_from(["once", "always", "never"]),
    kept=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_rows_in_any_batches(
    stored: Path, batches: list[list[int]], level: str, verify: Verify, kept: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_shards, "_OPEN_SHARDS", kept)
        store = FeatureStore(stored, verify)
    buffer = np.full((12, *EXPECTED[level].shape[1:]), np.nan, np.float16)
    for rows in batches:
        out = buffer[2 : 2 + len(rows)]
        store.read_codes_into("small", level, rows, out)
        np.testing.assert_array_equal(out, EXPECTED[level][rows])
        assert np.isnan(buffer[:2]).all()
        np.testing.assert_array_equal(store.read_codes("small", level, rows), out)
        buffer[:] = np.nan


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("codec", CODECS)
def test_decoded_rows_are_the_codecs_own(coded: Path, codec: str, threads: int) -> None:
    store = FeatureStore(coded)
    rows = [10, 0, 3, 3, 7]
    for target in store.teachers[codec].targets:
        place = (codec, target.level)
        fitted = store.codec(*place, target.grid)
        codes = store.read_codes(*place, rows, target.grid)
        decoded = [row if fitted is None else fitted.codec.decode(row) for row in codes]
        out = np.full((5, *target.grid, target.channels), np.nan, np.float32)
        store.read_into(*place, rows, out, target.grid, threads=threads)
        np.testing.assert_array_equal(out, np.stack(decoded))
        np.testing.assert_array_equal(store.read(*place, rows, target.grid), out)
        empty = store.read(*place, [], target.grid)
        assert (empty.shape, empty.dtype) == ((0, *out.shape[1:]), np.float32)


def test_portions_do_not_change_what_is_decoded(
    coded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FeatureStore(coded).read("int8", "stage_1", range(ROWS))
    for size in (1, 200):
        monkeypatch.setattr("store.stored_rows._CACHED_BYTES", size)
        found = FeatureStore(coded).read("int8", "stage_1", range(ROWS))
        np.testing.assert_array_equal(found, whole)


def test_float16_is_widened_into_a_float32_buffer(stored: Path) -> None:
    out = np.empty((3, 5), np.float32)
    FeatureStore(stored).read_into("small", GLOBAL, [4, 9, 0], out)
    np.testing.assert_array_equal(out, EXPECTED[GLOBAL][[4, 9, 0]].astype(np.float32))


def test_folder_object_storage_and_zarr_give_the_same(stored: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/store.zarr"
    write_store(url, sample_images(ROWS), SPEC)
    rows = [7, 2, 2, 10, 0]
    for level, array in (("stage_1", "stage_1/native"), (GLOBAL, GLOBAL)):
        here, there = (np.empty((5, *EXPECTED[level].shape[1:]), np.float16) for _ in range(2))
        FeatureStore(stored).read_codes_into("small", level, rows, here)
        FeatureStore(url).read_codes_into("small", level, rows, there)
        foreign = zarr.open_array(str(stored), path=f"small/{array}", mode="r")
        np.testing.assert_array_equal(here, there)
        np.testing.assert_array_equal(here, foreign.oindex[rows])
        wide = np.empty(here.shape, np.float32)
        FeatureStore(url).read_into("small", level, rows, wide)
        np.testing.assert_array_equal(wide, here.astype(np.float32))
    MemoryFileSystem.store.clear()


OPENED = """
import sys
from store.reader import FeatureStore
names = []
sys.addaudithook(lambda event, what: names.append(str(what[0])) if event == "open" else None)
store = FeatureStore(sys.argv[1])
store.codec("int8", "stage_1", (2, 2))
store.valid("int8")
names.clear()
for _ in range(2):
    store.read("int8", "stage_1", [9, 5, 8], (2, 2))
found = sorted({name[len(sys.argv[1]) + 1:] for name in names if name.startswith(sys.argv[1])})
print(*found, sep="\\n")
"""


def test_only_files_of_the_level_and_rows_asked_for_are_opened(coded: Path) -> None:
    """Rows 5, 8 and 9 are in the second and third shard of three, each of four."""
    command = [sys.executable, "-c", OPENED, str(coded)]
    found = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    array = "int8/stage_1/2x2"
    names = ("c.1.0.0.0", "c.2.0.0.0", "zarr.json")
    assert found.stdout.split() == [f"{array}/{name}" for name in names]


def test_buffers_that_cannot_be_filled_are_refused(stored: Path) -> None:
    store = FeatureStore(stored)
    read_only = np.empty((2, 3, 4, 6), np.float16)
    read_only.flags.writeable = False
    for out, message in [
        (np.empty((3, 3, 4, 6), np.float16), r"out is float16 \(3, .* should be float16 \(2, 3, 4"),
        (np.empty((2, 3, 4, 6), np.float32), "out is float32 .* it should be float16"),
        (np.empty((2, 3, 4, 6), ">f2"), "out is >f2 .* it should be float16"),
        (np.empty((4, 3, 4, 6), np.float16)[::2], "not contiguous"),
        (np.empty((2, 3, 6, 4), np.float16).swapaxes(2, 3), "not contiguous"),
        (read_only, "read-only"),
    ]:
        with pytest.raises(StoreError, match=message):
            store.read_codes_into("small", "stage_1", [0, 1], out)
    with pytest.raises(StoreError, match=r"it should be float32 \(1, 3, 4, 6\)"):
        store.read_into("small", "stage_1", [0], np.empty((1, 3, 4), np.float32))


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x10]))


def read_shard(store: FeatureStore) -> np.ndarray:
    out = np.empty((4, 3, 4, 6), np.float16)
    store.read_codes_into("small", "stage_1", [3, 1, 0, 2], out)
    return out


@pytest.mark.parametrize("verify", ["once", "always"])
@pytest.mark.parametrize("offset", [0, 143, 144, 300, 4 * 148 - 1, 4 * 148, -5, -1])
def test_flipped_byte_is_refused_at_the_first_read(path: Path, offset: int, verify: Verify) -> None:
    flip(path / SHARD.format(0), offset)
    store = FeatureStore(path, verify)
    for _ in range(2):  # and again: a refused row does not pass for a checked one
        with pytest.raises(StoreDamagedError, match=r"c\.0\.0\.0\.0 is damaged: the checksum"):
            read_shard(store)


def test_checksums_are_compared_as_often_as_asked(path: Path) -> None:
    stores: list[FeatureStore] = [FeatureStore(path, verify) for verify in ("once", "always")]
    for store in stores:
        read_shard(store)
    flip(path / SHARD.format(0), 10)  # in place, under the readers
    changed = read_shard(stores[0])  # row 0 was found sound before
    assert (changed[2] != EXPECTED["stage_1"][0]).sum() == 1
    with pytest.raises(StoreDamagedError, match="checksum of its entry 0"):
        read_shard(stores[1])
    assert (read_shard(FeatureStore(path, "never")) == changed).all()
    with pytest.raises(StoreDamagedError, match="checksum of its entry 0"):
        read_shard(pickle.loads(pickle.dumps(stores[0])))


@pytest.mark.parametrize("change", [-1, 1, -500])
def test_shard_cut_under_a_reader_is_refused(path: Path, change: int) -> None:
    file = path / SHARD.format(0)
    store = FeatureStore(path)
    for _ in range(2):  # the second time from the map
        read_shard(store)
    os.truncate(file, file.stat().st_size + change)
    with pytest.raises(StoreDamagedError, match=r"had 660 bytes when it was opened, it has"):
        read_shard(store)
    with pytest.raises(StoreDamagedError, match=r"it should have 660 bytes, it has"):
        read_shard(FeatureStore(path))


def test_shard_deleted_or_replaced_is_read_on_by_who_has_it_open(path: Path) -> None:
    file = path / SHARD.format(0)
    store = FeatureStore(path)
    other = file.with_name("other")
    other.write_bytes(b"\0" * file.stat().st_size)
    read_shard(store)
    for change in (lambda: other.replace(file), file.unlink):
        change()
        np.testing.assert_array_equal(read_shard(store), EXPECTED["stage_1"][[3, 1, 0, 2]])
        with pytest.raises(StoreDamagedError, match=r"is damaged|is missing from the store"):
            read_shard(FeatureStore(path))
    (path / SHARD.format(1)).unlink()
    with pytest.raises(StoreDamagedError, match=r"c\.1\.0\.0\.0 is missing"):
        store.read_codes("small", "stage_1", [0, 4])


def test_files_stay_below_the_limit_and_are_closed(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_shards, "_OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    store = FeatureStore(stored)
    for _ in range(3):
        for level in EXPECTED:
            for _ in range(2):
                store.read_codes("small", level, range(ROWS))
            assert len(os.listdir("/proc/self/fd")) <= before + 4  # a file and its map each
    shards = store._rows._open
    shards.get.cache_clear()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_share_a_store_that_opens_and_closes_shards(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_shards, "_OPEN_SHARDS", 1)
    store = FeatureStore(stored)

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, ROWS, 7)
        out = np.empty((7, 3, 4, 6), np.float16)
        store.read_codes_into("small", "stage_1", rows, out)
        return np.array_equal(out, EXPECTED["stage_1"][rows])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(300)))


def _read_in_child(store: FeatureStore, results: Any) -> None:
    rows = np.random.default_rng(os.getpid()).permutation(ROWS)
    for _ in range(3):
        found = store.read_codes("small", "stage_1", rows)
    results.put((rows, found))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_processes_read_a_pickled_store(stored: Path, method: str) -> None:
    store = FeatureStore(stored)
    for _ in range(2):
        store.read_codes("small", "stage_1", range(ROWS))
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=_read_in_child, args=(store, results))
    process.start()
    rows, found = results.get(timeout=60)
    process.join()
    np.testing.assert_array_equal(found, EXPECTED["stage_1"][rows])


FORKED = """
import os, sys
import numpy as np
from store.reader import FeatureStore
store = FeatureStore(sys.argv[1])
rows = np.arange(11)
before = [store.read_codes("small", "stage_1", rows) for _ in range(2)][1]  # from the map
children = []
for child in range(3):
    pid = os.fork()
    if pid == 0:
        order = np.random.default_rng(child).permutation(11)
        same = all(
            np.array_equal(store.read_codes("small", "stage_1", order), before[order])
            for _ in range(50)
        )
        os._exit(0 if same else 3)
    children.append(pid)
again = np.array_equal(store.read_codes("small", "stage_1", rows), before)
assert again and not any([os.waitpid(pid, 0)[1] for pid in children])
"""


def test_maps_are_valid_after_a_fork(stored: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKED, str(stored)], check=True, timeout=60)


CUT_AMID = """
import os, sys
from store.shard import ShardReader
from store.reader import FeatureStore
store = FeatureStore(sys.argv[1])
for _ in range(2):
    store.read_codes("small", "stage_1", [0])
ShardReader.refuse_cut = lambda self: os.truncate(sys.argv[2], 0)  # just after the look
store.read_codes("small", "stage_1", [0])
"""


def test_shard_cut_in_the_middle_of_a_copy_ends_the_process(path: Path) -> None:
    """The docstring of `FeatureStore` says so."""
    command = [sys.executable, "-c", CUT_AMID, str(path), str(path / SHARD.format(0))]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGBUS


def test_failed_reads_are_errors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., int] = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: real(*arguments) - 1)
    with pytest.raises(StoreDamagedError, match="checksum of its entry 0"):
        read_shard(FeatureStore(path))
