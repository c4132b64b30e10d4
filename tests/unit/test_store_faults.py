"""Kills, full disks, torn and altered files, second writers: nothing lost, nothing wrong read."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store import begun, disk
from store.append import append_images
from store.begun import bytes_to_come
from store.errors import (
    StoreDamagedError,
    StoreError,
    StoreFormatError,
    StoreLockedError,
    StoreMismatchError,
    UnfinishedStoreError,
)
from store.files import lock_folder
from store.reader import FeatureStore
from store.testing import (
    file_digests,
    flip_bits,
    read_everything,
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
ROWS = 6
SHARD_BYTES = sample_shard_bytes(SPEC, 4)
DATA = "small/stage_1/native/c.0.0.0.0"


def make(path: Path) -> None:
    write_store(path, sample_images(ROWS), SPEC, covariance=True)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make(tmp_path / "store")
    return tmp_path / "store"


KILLED = """
import os, shutil, sys
from pathlib import Path
from store.testing import *
folder = Path(sys.argv[1])

def run(path, kill_at):
    kill_at_call(kill_at, ("writev", "fsync", "replace", "unlink"))
    write_store(path, sample_images(6), sample_teacher(), covariance=True)

for number in range(1, 10_000, 3):  # each file takes four calls, so all four are hit
    child = os.fork()
    if child == 0:
        run(folder / str(number), number)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(number)
"""


def test_killed_at_any_moment_and_resumed_equals_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], check=True, capture_output=True, text=True
    )
    moments = int(done.stdout)
    assert moments > 150  # so 50 kills at least
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    whole = file_digests(tmp_path / str(moments))
    left = {"finished": 0, "shards": 0}
    for moment in range(1, moments, 3):
        path = tmp_path / str(moment)
        left["shards"] += any(path.glob("small/valid/c.*"))
        if (path / "small").exists():
            assert FeatureStore(path).unfinished in ((), ("small",))
            left["finished"] += "small" in FeatureStore(path).teachers
        make(path)
        assert file_digests(path) == whole, f"killed at call {moment}"
        shutil.rmtree(path)
    assert left["shards"] > 10  # the kills did fall between commits,
    assert left["finished"] < 5  # and hardly any after the finished mark


def test_the_commit_mark_is_placed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[str] = []
    real = os.replace

    def replace_and_note(source: Path, target: Path) -> None:
        placed.append(str(Path(target).relative_to(tmp_path / "small")))
        real(source, target)

    create_store(tmp_path, sample_images(ROWS), sample_views(ROWS))
    with FeatureWriter.open(tmp_path, SPEC, SHARD_BYTES, covariance=True) as writer:
        monkeypatch.setattr(os, "replace", replace_and_note)
        write_rows(writer, SPEC, range(4))
    features = {"stage_1/native/c.0.0.0.0", "stage_2/native/c.0.0.0.0", "global/c.0.0"}
    assert set(placed[:3]) == features
    commits = ["commit/digest/c.0.0.0", "commit/statistics/c.0.0.0", "commit/covariance/c.0.0"]
    assert placed[3:] == [*commits, "valid/c.0"]


def test_second_writer_of_a_shard_is_refused_and_a_dead_ones_lock_is_free(tmp_path: Path) -> None:
    create_store(tmp_path, sample_images(ROWS), sample_views(ROWS))
    code = (
        "import sys, time; from store.testing import *; from store.writer import FeatureWriter\n"
        f"w = FeatureWriter.open(sys.argv[1], sample_teacher(), {SHARD_BYTES}); w.claim(range(4))\n"
        "print('claimed', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"claimed\n"
            with FeatureWriter.open(tmp_path, SPEC) as writer:
                assert writer.missing() == [range(4), range(4, ROWS)]
                assert not writer.claim(range(4))
                with pytest.raises(StoreLockedError, match=r"writing range\(0, 4\) of .*small"):
                    write_rows(writer, SPEC, range(4))
                write_rows(writer, SPEC, range(4, ROWS))
                with pytest.raises(UnfinishedStoreError):
                    writer.finish()
            with pytest.raises(StoreLockedError, match=r"another process is writing .*small"):
                lock_folder(tmp_path / "small")  # as gc and repair do
        finally:
            other.kill()
    with FeatureWriter.open(tmp_path, SPEC) as writer:
        write_rows(writer, SPEC, range(4))
        writer.finish()
    assert not list(tmp_path.rglob(".lock*"))


def test_several_writers_fill_one_store_and_any_of_them_finishes_it(tmp_path: Path) -> None:
    path = tmp_path / "store"
    create_store(path, sample_images(ROWS), sample_views(ROWS))
    with (
        FeatureWriter.open(path, SPEC, SHARD_BYTES, covariance=True) as one,
        FeatureWriter.join(path, SPEC) as two,
    ):
        (first, last) = two.missing()
        assert one.claim(first)
        write_rows(two, SPEC, last)  # while the other holds a shard
        assert not one.claim(last)
        assert one.missing() == two.missing() == [first]
        with pytest.raises(StoreError, match="written already"):
            write_rows(one, SPEC, last)
        write_rows(one, SPEC, first)
        two.finish()
        one.finish()
    make(tmp_path / "whole")
    assert file_digests(path) == file_digests(tmp_path / "whole")


def test_a_writer_of_fewer_images_writes_nothing_into_a_grown_store(tmp_path: Path) -> None:
    create_store(tmp_path, sample_images(ROWS), sample_views(ROWS))
    with FeatureWriter.open(tmp_path, SPEC, SHARD_BYTES) as old:
        append_images(tmp_path, sample_images(9), sample_views(9))
        with FeatureWriter.open(tmp_path, SPEC) as new:
            assert new.missing() == [range(4), range(4, 8), range(8, 9)]
        before = file_digests(tmp_path)
        with pytest.raises(StoreMismatchError, match="images were added"):
            write_rows(old, SPEC, range(4, 6))
        with pytest.raises(UnfinishedStoreError):
            old.finish()
        assert file_digests(tmp_path) == before


def test_only_a_teacher_that_was_begun_alike_is_joined(path: Path) -> None:
    with pytest.raises(StoreMismatchError, match="begun with other settings"):
        FeatureWriter.join(path, sample_teacher(weights_sha256="cd" * 32))
    with pytest.raises(StoreError, match="missing from the store"):
        FeatureWriter.join(path, sample_teacher("second"))


def test_a_shard_that_will_not_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    create_store(path, sample_images(ROWS), sample_views(ROWS))
    with FeatureWriter.open(path, SPEC, SHARD_BYTES, covariance=True) as writer:
        write_rows(writer, SPEC, range(4))
        before = file_digests(path)
        usage = shutil.disk_usage(path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=disk.RESERVE_BYTES))
        with pytest.raises(
            StoreError,
            match=r"needs 0\.0 MiB, and 64 MiB are kept free; 64\.0 MiB .* 1 of 2 shards",
        ):
            write_rows(writer, SPEC, range(4, 6))
        monkeypatch.undo()
    assert file_digests(path) == before
    make(path)
    make(tmp_path / "whole")
    assert file_digests(path) == file_digests(tmp_path / "whole")


def test_shards_that_others_have_begun_count_against_the_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "store", sample_teacher("other")
    create_store(path, sample_images(ROWS), sample_views(ROWS))
    large = SHARD_BYTES * ROWS
    with (
        FeatureWriter.open(path, other, large) as beside,
        FeatureWriter.open(path, SPEC, SHARD_BYTES) as writer,
    ):
        assert beside.claim(range(ROWS))  # claimed is not begun
        usage = shutil.disk_usage(path)
        free = disk.RESERVE_BYTES + 2**13
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        write_rows(writer, SPEC, range(4))
        monkeypatch.setattr(begun, "_lacking", lambda *_: 2**13)
        with pytest.raises(StoreError, match=r"shards that are being written 0\.0 MiB, and 64 MiB"):
            write_rows(writer, SPEC, range(4, 6))
        monkeypatch.undo()


def test_what_a_begun_shard_lacks_shrinks_with_every_row_and_ends_with_its_writer(
    tmp_path: Path,
) -> None:
    path, other = tmp_path / "store", sample_teacher("other")
    create_store(path, sample_images(ROWS), sample_views(ROWS))
    folder = path / SPEC.name
    with (
        FeatureWriter.open(path, other, SHARD_BYTES) as beside,
        FeatureWriter.open(path, SPEC, SHARD_BYTES) as writer,
    ):
        assert writer.claim(range(4))
        assert bytes_to_come(path, folder, 0) == 0
        write_rows(beside, other, range(1))
        first = bytes_to_come(path, folder, 0)
        write_rows(beside, other, range(1, 2))
        assert 0 < bytes_to_come(path, folder, 0) < first
        assert bytes_to_come(path, path / "other", 0) == 0
        write_rows(beside, other, range(2, 4))
        assert bytes_to_come(path, folder, 0) == 0
        write_rows(beside, other, range(4, 5))
        assert bytes_to_come(path, folder, 0) > 0
    assert bytes_to_come(path, folder, 0) == 0


def test_no_flipped_byte_is_ever_returned(path: Path) -> None:
    expected = read_everything(path)
    flips = refused = 0
    for file, _ in flip_bits(path, 4, np.random.default_rng(0)):
        flips += 1
        try:
            for name, values in read_everything(path).items():
                np.testing.assert_array_equal(values, expected[name], err_msg=str(file))
        except StoreError:
            refused += 1
    assert refused > flips / 2


@pytest.mark.parametrize("offset", [0, 100, 147, -5, -1])
def test_flipped_byte_of_a_shard_is_named(path: Path, offset: int) -> None:
    data = bytearray((path / DATA).read_bytes())
    data[offset] ^= 0x10
    (path / DATA).write_bytes(data)
    with pytest.raises(StoreDamagedError, match=r"c\.0\.0\.0\.0 is damaged.*extract-teachers"):
        FeatureStore(path).read("small", "stage_1", [0])


@pytest.mark.parametrize("damage", ["remove", "shorten"])
@pytest.mark.parametrize("name", [DATA, "small/global/c.0.0", "small/valid/c.0"])
def test_lost_shard_is_refused_and_computed_again(path: Path, name: str, damage: str) -> None:
    whole = file_digests(path)
    if damage == "remove":
        (path / name).unlink()
    else:
        os.truncate(path / name, 3)
    with pytest.raises(StoreDamagedError, match=r"missing from the store|should have"):
        read_everything(path)
    with FeatureWriter.open(path, SPEC) as writer:
        assert writer.missing() == [range(4)]
        write_rows(writer, SPEC, range(4))
        with pytest.raises(UnfinishedStoreError):
            FeatureStore(path).valid("small")
        writer.finish()
    assert file_digests(path) == whole


@pytest.mark.parametrize("name", ["digest/c.0.0.0", "statistics/c.0.0.0", "covariance/c.0.0"])
def test_altered_commit_file_is_computed_again(path: Path, name: str) -> None:
    whole = file_digests(path)
    data = bytearray((path / "small" / "commit" / name).read_bytes())
    data[9] ^= 1
    (path / "small" / "commit" / name).write_bytes(data)
    with FeatureWriter.open(path, SPEC) as writer:
        assert writer.missing() == [range(4)]
        write_rows(writer, SPEC, range(4))
        writer.finish()
    assert file_digests(path) == whole


def test_a_failed_write_drops_its_shard_only(tmp_path: Path) -> None:
    create_store(tmp_path, sample_images(ROWS), sample_views(ROWS))
    with FeatureWriter.open(tmp_path, SPEC, SHARD_BYTES) as writer:
        write_rows(writer, SPEC, range(4, 6))
        write_rows(writer, SPEC, range(2))
    assert not list(tmp_path.rglob("*.partial"))
    with FeatureWriter.open(tmp_path, SPEC) as writer:
        assert writer.missing() == [range(4)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_says_what_is_safe_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "store"
    create_store(path, sample_images(ROWS), sample_views(ROWS))
    real = os.writev
    left = 10**9

    def write(descriptor: int, parts: Sequence[memoryview]) -> int:
        nonlocal left
        if sum(map(len, parts)) > left:
            raise OSError(code, os.strerror(code))
        left -= sum(map(len, parts))
        return real(descriptor, parts)

    with FeatureWriter.open(path, SPEC, SHARD_BYTES, covariance=True) as writer:
        write_rows(writer, SPEC, range(4))
        monkeypatch.setattr(os, "writev", write)
        left = 400
        with pytest.raises(
            StoreError, match=r"no space left .*still needs 0\.0 MiB; 1 of 2 shards are safe.*again"
        ):
            write_rows(writer, SPEC, range(4, 6))
        assert not list(path.rglob("*.partial"))
        monkeypatch.undo()
    make(path)
    make(tmp_path / "whole")
    assert file_digests(path) == file_digests(tmp_path / "whole")


def test_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from store.testing import *\n"
        "from store.errors import StoreError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try: write_store(Path(sys.argv[1]), sample_images(40), sample_teacher(), "
        "rows_per_shard=20)\n"
        "except StoreError as error: print(error)"
    )
    for limit, message in ((700, "Nothing was written"), (3000, "0 of 2 shards are safe")):
        command = [sys.executable, "-c", code, str(tmp_path / "store"), str(limit)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "no space left" in done.stdout
        assert message in done.stdout
    assert not list(tmp_path.rglob("*.partial"))
    for name in ("store", "whole"):
        write_store(tmp_path / name, sample_images(40), SPEC, rows_per_shard=20)
    assert file_digests(tmp_path / "store") == file_digests(tmp_path / "whole")


def test_other_images_are_refused_with_what_differs(path: Path) -> None:
    images = sample_images(ROWS + 1)
    with pytest.raises(StoreMismatchError) as caught:
        create_store(path, images, sample_views(ROWS + 1))
    assert "images: store has 6, asked for 7" in str(caught.value)
    assert "1 images not in the store, such as 'room/0006-é'" in str(caught.value)
    swapped = (images.ids[1], images.ids[0], *images.ids[2:ROWS])
    with pytest.raises(StoreMismatchError, match="first difference in ids, image 0"):
        create_store(path, replace(sample_images(ROWS), ids=swapped), sample_views(ROWS))


def test_other_teacher_of_the_same_name_is_refused_with_what_differs(path: Path) -> None:
    other = sample_teacher(weights_sha256="cd" * 32, precision="bf16")
    with pytest.raises(StoreMismatchError) as caught:
        FeatureWriter.open(path, other)
    assert f"spec.provenance.weights_sha256: store has '{'ab' * 32}'" in str(caught.value)
    assert "precision: store has '(absent)', asked for 'bf16'" in str(caught.value)
    assert f"delete {path / 'small'} to extract it anew" in str(caught.value)
    with FeatureWriter.open(path, SPEC) as writer:  # the refusal let the lock go
        assert writer.missing() == []


def test_teacher_left_from_other_images_is_refused(path: Path) -> None:
    for name in ("images", "views"):
        shutil.rmtree(path / name)
    (path / "zarr.json").unlink()
    create_store(path, sample_images(ROWS, quarantined=[1]), sample_views(ROWS))
    store = FeatureStore(path)
    assert dict(store.teachers) == {}
    with pytest.raises(StoreMismatchError, match="extracted for other images or views"):
        store.read("small", "stage_1", [0])
    with pytest.raises(StoreMismatchError, match="images_digest"):
        FeatureWriter.open(path, SPEC)


def test_features_without_their_description_are_not_trusted(path: Path) -> None:
    (path / "small" / "zarr.json").unlink()
    with FeatureWriter.open(path, sample_teacher(weights_sha256="cd" * 32)) as writer:
        assert sum(map(len, writer.missing())) == ROWS


@pytest.mark.parametrize("name", ["zarr.json", "small/zarr.json"])
def test_other_formats_are_refused_with_advice(path: Path, name: str) -> None:
    edit(path / name, lambda document: document["attributes"].update(format_version=4))
    with pytest.raises(StoreFormatError, match=r"format version 4, this release reads 3; upgrade"):
        FeatureStore(path)
    edit(path / name, lambda document: document["attributes"].pop("format"))
    with pytest.raises(StoreFormatError, match="not of a feature store"):
        FeatureStore(path)


def test_no_store_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no feature store at"):
        FeatureStore(tmp_path / "nowhere")
    with pytest.raises(StoreFormatError, match=r"it has no zarr\.json"):
        FeatureStore(tmp_path)
    with pytest.raises(StoreError, match="there is no feature store at"):
        FeatureWriter.open(tmp_path / "nowhere", SPEC)


HUGE = 10**15


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("small/stage_1/native/zarr.json", lambda d: d.update(shape=[ROWS, HUGE, 4, 6])),
        ("small/stage_1/native/zarr.json", lambda d: d.update(data_type="float64")),
        ("small/stage_1/native/zarr.json", lambda d: d.update(codecs=[])),
        ("small/zarr.json", lambda d: d["attributes"].update(rows_per_shard=HUGE)),
        ("small/zarr.json", lambda d: d["attributes"].update(rows=HUGE)),
        ("small/zarr.json", lambda d: d["attributes"].update(rows=True)),
        ("small/zarr.json", lambda d: d["attributes"]["spec"].update(name="../../etc")),
        ("small/zarr.json", lambda d: d["attributes"]["spec"].update(name="other")),
        ("small/zarr.json", lambda d: d["attributes"]["spec"]["levels"].clear()),
        ("small/zarr.json", lambda d: d["attributes"].update(spec=[])),
        ("zarr.json", lambda d: d["attributes"].update(images=HUGE)),
        ("zarr.json", lambda d: d["attributes"].update(image_size=[1])),
        ("zarr.json", lambda d: d.update(zarr_format=2)),
        ("images/id/zarr.json", lambda d: d.update(shape=[ROWS, HUGE])),
        ("images/id/zarr.json", lambda d: d.update(shape="all")),
    ],
)
def test_hostile_metadata_is_refused(
    path: Path, name: str, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(path / name, change)
    with pytest.raises(StoreError):
        read_everything(path)


def test_a_consistent_lie_about_the_grid_is_refused_before_allocating(path: Path) -> None:
    level = replace(SPEC.levels[0], grid=(HUGE, HUGE), stored=())
    lie = replace(SPEC, levels=(level, *SPEC.levels[1:]))

    def change(document: dict[str, Any]) -> None:
        document["attributes"].update(spec=lie.to_attributes(), fingerprint=lie.fingerprint())

    edit(path / "small" / "zarr.json", change)
    array = path / "small" / "stage_1" / "native" / "zarr.json"
    shape = [HUGE, HUGE, 6]

    def reshape(document: dict[str, Any]) -> None:
        document["shape"][1:] = shape
        document["chunk_grid"]["configuration"]["chunk_shape"][1:] = shape
        document["codecs"][0]["configuration"]["chunk_shape"][1:] = shape

    edit(array, reshape)
    with pytest.raises(StoreDamagedError, match="it should have"):
        FeatureStore(path).read("small", "stage_1", [0])


def test_broken_json_is_refused(path: Path) -> None:
    for text in (b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000):
        (path / "small" / "zarr.json").write_bytes(text)
        with pytest.raises(StoreDamagedError, match="JSON"):
            FeatureStore(path)


def test_features_read_back_are_the_sample(path: Path) -> None:
    expected = sample_features(SPEC, range(ROWS))["stage_1"].astype(np.float16)
    np.testing.assert_array_equal(read_everything(path)["stage_1"], expected)


@pytest.mark.parametrize("count", [5, 10**18])
def test_a_writer_refuses_shards_cut_otherwise_before_it_writes(path: Path, count: int) -> None:
    edit(
        path / "small" / "zarr.json",
        lambda document: document["attributes"].update(rows_per_shard=count),
    )
    before = file_digests(path)
    with pytest.raises(StoreDamagedError, match="nothing was written"):
        FeatureWriter.open(path, SPEC, covariance=True)
    assert file_digests(path) == before
