"""Work shared between threads: all of it done once, errors raised when nobody works any more."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from store import local_shards
from store.errors import StoreDamagedError
from store.reader import FeatureStore
from store.testing import sample_features, sample_images, sample_teacher, write_store
from store.threads import each_in_threads, usual_threads

ROWS = 11


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 13])
def test_every_item_is_worked_on_once(threads: int, count: int) -> None:
    done: list[int] = []
    each_in_threads(done.append, range(count), threads)
    assert sorted(done) == list(range(count))


def test_threads_work_at_the_same_time_and_the_caller_is_one_of_them() -> None:
    barrier = threading.Barrier(3)
    who: list[int] = []

    def work(item: int) -> None:
        who.append(threading.get_ident())
        barrier.wait(timeout=20)

    each_in_threads(work, range(3), 3)
    assert len(set(who)) == 3
    assert threading.get_ident() in who


@pytest.mark.parametrize("bad", [0, 1])  # the caller's share, and another's
def test_an_error_is_raised_after_the_others_have_ended(bad: int) -> None:
    ended = []

    def work(item: int) -> None:
        if item == bad:
            raise ValueError("bad row")
        time.sleep(0.3)
        ended.append(item)

    with pytest.raises(ValueError, match="bad row"):
        each_in_threads(work, range(2), 2)
    assert ended == [1 - bad]


FORKED = """
import os
from store.threads import each_in_threads
done = []
each_in_threads(done.append, range(8), 3)  # starts threads, which the child has not
pid = os.fork()
each_in_threads(done.append, range(8), 3)
if pid == 0:
    os._exit(0 if len(done) == 16 else 3)
assert os.waitpid(pid, 0)[1] == 0 and len(done) == 16
"""


def test_a_forked_process_starts_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=30)


def test_processes_that_load_side_by_side_take_one_thread_each() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        assert processes.submit(usual_threads).result() == 1
    assert usual_threads() == min(4, len(os.sched_getaffinity(0)))


def test_copies_are_shared_where_there_is_much_to_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = sample_teacher()
    expected = sample_features(spec, range(ROWS))["stage_1"].astype(np.float16)
    write_store(tmp_path, sample_images(ROWS), spec)
    asked: list[int] = []

    def counted(function: object, items: object, threads: int) -> None:
        asked.append(threads)
        each_in_threads(function, items, threads)  # type: ignore[arg-type]

    monkeypatch.setattr(local_shards, "each_in_threads", counted)
    store = FeatureStore(tmp_path)
    rows = [10, 3, 3, 0, 7, 1]
    for size, threads in ((None, 1), (6 * 144, 3), (6 * 144 + 1, 1)):
        if size is not None:
            monkeypatch.setattr(local_shards, "_SHARED_BYTES", size)
        for _ in range(2):  # compared with their checksums, then out of the map
            out = np.full((6, 3, 4, 6), np.nan, np.float16)
            store.read_codes_into("small", "stage_1", rows, out, threads=3)
            np.testing.assert_array_equal(out, expected[rows])
        assert asked[-2:] == [threads, threads]
    monkeypatch.setattr(local_shards, "_SHARED_BYTES", 0)
    file = tmp_path / "small/stage_1/native/c.1.0.0.0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreDamagedError, match="checksum of its entry 0"):
        FeatureStore(tmp_path).read_codes_into("small", "stage_1", [0, 1, 4, 2], out[:4], threads=3)
