"""Several processes on one store: who writes which shard, who waits, who finishes."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.extract.sharing import write_missing
from stages.progress import NoProgress
from stages.stopping import Stop, Terminated
from store.reader import FeatureStore
from store.testing import (
    file_contents,
    sample_images,
    sample_shard_bytes,
    sample_teacher,
    sample_views,
    write_rows,
    write_store,
)
from store.writer import FeatureWriter, create_store

SPEC = sample_teacher()
ROWS = 30
SHARD_BYTES = sample_shard_bytes(SPEC, 2)


class Counted(NoProgress):
    def __init__(self) -> None:
        self.done = 0

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


@pytest.fixture
def store(tmp_path: Path) -> Path:
    create_store(tmp_path / "store", sample_images(ROWS), sample_views(ROWS))
    return tmp_path / "store"


def open_writer(store: Path) -> FeatureWriter:
    return FeatureWriter.open(store, SPEC, SHARD_BYTES)


def test_all_are_at_work_at_once_and_each_shard_is_written_once(
    store: Path, tmp_path: Path
) -> None:
    count = 4
    together = threading.Barrier(count, timeout=60)

    def work(_: int) -> list[range]:
        met = False

        def write(shards: Iterator[range]) -> None:
            nonlocal met
            for rows in shards:
                if not met:
                    together.wait()  # each holds a shard of its own
                    met = True
                write_rows(writer, SPEC, rows)

        with open_writer(store) as writer:
            done = write_missing([writer], lambda shards: write(shards[0]), NoProgress(), Stop())[0]
            writer.finish()
        return done

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(work, range(count)))
    shards = sorted(rows.start for done in results for rows in done)
    assert shards == list(range(0, ROWS, 2))
    assert all(results)
    write_store(tmp_path / "whole", sample_images(ROWS), SPEC, rows_per_shard=2)
    assert file_contents(store) == file_contents(tmp_path / "whole")


def test_what_another_gave_up_is_taken_over(store: Path, tmp_path: Path) -> None:
    other = open_writer(store)
    assert other.claim(range(4, 6))
    write_rows(other, SPEC, range(4, 5))
    passes: list[list[range]] = []

    def write(shards: Iterator[range]) -> None:
        passes.append(list(shards))
        if not passes[-1]:
            other.close()  # as the kernel does when it dies
        for rows in passes[-1]:
            write_rows(writer, SPEC, rows)

    progress = Counted()
    with open_writer(store) as writer:
        done = write_missing([writer], lambda shards: write(shards[0]), progress, Stop())[0]
        writer.finish()
    assert passes[0] == [range(row, row + 2) for row in range(0, ROWS, 2) if row != 4]
    assert [rows for one in passes[1:] for rows in one] == [range(4, 6)]
    assert len(done) == 15
    write_store(tmp_path / "whole", sample_images(ROWS), SPEC, rows_per_shard=2)
    assert file_contents(store) == file_contents(tmp_path / "whole")


def test_what_others_commit_counts_as_progress(store: Path) -> None:
    other = open_writer(store)
    assert other.claim(range(2))

    def write(shards: Iterator[range]) -> None:
        for rows in shards:
            write_rows(writer, SPEC, rows)
            if rows == range(4, 6):
                write_rows(other, SPEC, range(2))

    progress = Counted()
    with open_writer(store) as writer, other:
        assert (
            range(2)
            not in write_missing([writer], lambda shards: write(shards[0]), progress, Stop())[0]
        )
    assert progress.done == 2


def test_a_stop_finishes_the_shard_and_leaves_the_rest_to_others(store: Path) -> None:
    stop = Stop()

    def write(shards: Iterator[range]) -> None:
        for rows in shards:
            write_rows(writer, SPEC, range(rows.start, rows.start + 1))
            stop.request()
            write_rows(writer, SPEC, range(rows.start + 1, rows.stop))

    with open_writer(store) as writer, pytest.raises(Terminated):
        write_missing([writer], lambda shards: write(shards[0]), NoProgress(), stop)[0]
    with open_writer(store) as writer:
        assert writer.missing() == [range(row, row + 2) for row in range(2, ROWS, 2)]
        assert writer.claim(range(2, 4))
    assert FeatureStore(store).unfinished == ("small",)
    assert not [name for name in file_contents(store) if "lock" in name or "partial" in name]
