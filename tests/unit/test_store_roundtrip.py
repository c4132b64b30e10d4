"""What is read is what was written, for any rows, shards, batches and interruption."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.errors import StoreError, StoreMismatchError, UnfinishedStoreError
from store.reader import FeatureStore
from store.spec import GLOBAL, LevelSpec, TeacherSpec
from store.teacher_layout import MAX_ROWS_PER_SHARD, TeacherLayout, with_rows_per_shard
from store.testing import (
    file_digests,
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


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_rows_shards_batches_and_interruption(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 23), label="rows")
    rows_per_shard = data.draw(st.integers(1, 9), label="rows per shard")
    bad = data.draw(st.sets(st.integers(0, rows - 1), max_size=rows - 1), label="quarantined")
    stop = data.draw(st.integers(0, rows), label="rows before the interruption")
    covariance = data.draw(st.booleans(), label="covariance")
    images, views = sample_images(rows, tuple(bad)), sample_views(rows)
    valid = ~np.isin(np.arange(rows), list(bad))
    size = sample_shard_bytes(SPEC, rows_per_shard)
    with TemporaryDirectory() as folder, mock.patch("os.fsync"):
        path, uninterrupted = Path(folder) / "store", Path(folder) / "whole"
        create_store(path, images, views)
        for limit in (stop, rows):
            with FeatureWriter.open(path, SPEC, size, covariance=covariance) as writer:
                for shard in writer.missing():
                    start = shard.start
                    while start < min(shard.stop, limit):
                        length = data.draw(st.integers(1, shard.stop - start), label="batch")
                        write_rows(writer, SPEC, range(start, start + length), valid)
                        start += length
                if limit == rows:
                    writer.finish()
        write_store(
            uninterrupted, images, SPEC, rows_per_shard=rows_per_shard, covariance=covariance
        )
        assert file_digests(path) == file_digests(uninterrupted)

        store = FeatureStore(path)
        good = np.flatnonzero(valid)
        index = data.draw(st.lists(st.sampled_from(good.tolist()), max_size=8), label="index")
        expected = sample_features(SPEC, range(rows))
        np.testing.assert_array_equal(store.valid("small"), valid)
        for level, values in expected.items():
            found = store.read("small", level, index)
            assert found.dtype == np.float16
            np.testing.assert_array_equal(found, values.astype(np.float16)[index])
        for level in ("stage_1", "stage_2"):
            tokens = expected[level].astype(np.float16).astype(np.float64)[good]
            statistics = store.statistics("small", level)
            assert statistics.count == tokens[..., 0].size
            np.testing.assert_allclose(statistics.mean, tokens.mean(axis=(0, 1, 2)), atol=1e-6)
            np.testing.assert_allclose(statistics.variance, tokens.var(axis=(0, 1, 2)), rtol=1e-6)
            assert (statistics.covariance is not None) == covariance
            if statistics.covariance is not None:
                matrix = tokens.reshape(-1, tokens.shape[-1])
                expected_covariance = np.cov(matrix, rowvar=False, bias=True)
                deviation = np.sqrt(statistics.variance)
                error = np.abs(statistics.covariance - expected_covariance)
                assert (error <= 2e-6 * np.outer(deviation, deviation)).all()
                np.testing.assert_array_equal(np.diag(statistics.covariance), statistics.variance)
        for row in bad:
            with pytest.raises(StoreError, match="zero bytes"):
                store.read("small", "stage_1", [row])


def test_tables_round_trip(tmp_path: Path) -> None:
    images, views = sample_images(5, quarantined=[3]), sample_views(10, views_per_image=2)
    create_store(tmp_path / "store", images, views)
    store = FeatureStore(tmp_path / "store")
    assert store.images == images
    assert store.views == views
    assert store.rows == 10
    assert store.row("room/0003-é") == 6
    assert store.row("room/0003-é", view=1) == 7
    with pytest.raises(StoreError, match="did you mean 'room/0003-é'"):
        store.row("room/0003")
    with pytest.raises(StoreError, match="view 2: the store has 2"):
        store.row("room/0003-é", view=2)


def test_create_is_idempotent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "store"
    create_store(path, sample_images(3), sample_views(3))
    before = file_digests(path)
    create_store(path, sample_images(3), sample_views(3))
    assert file_digests(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == ["store"]


def test_create_gives_teachers_left_alone_their_root_back(tmp_path: Path) -> None:
    path = tmp_path / "store"
    write_store(path, sample_images(3), SPEC)
    whole = file_digests(path)
    (path / ".gitignore").write_text("/small\n")  # as DVC leaves it
    (path / "zarr.json").unlink()
    (path / "images" / "id" / "zarr.json").unlink()
    create_store(path, sample_images(3), sample_views(3))
    (path / ".gitignore").unlink()
    assert file_digests(path) == whole


def test_create_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(StoreError, match="holds 'photos'"):
        create_store(tmp_path, sample_images(1), sample_views(1))
    with pytest.raises(StoreError, match="is a file"):
        create_store(tmp_path / "photos" / "cat.png", sample_images(1), sample_views(1))


def test_views_must_fit_the_images(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="3 rows are needed, the view table has 4"):
        create_store(tmp_path / "store", sample_images(3), sample_views(4))


def test_unwritten_is_refused_until_finished(tmp_path: Path) -> None:
    path = tmp_path / "store"
    create_store(path, sample_images(6), sample_views(6))
    with FeatureWriter.open(path, SPEC, sample_shard_bytes(SPEC, 4)) as writer:
        assert writer.missing() == [range(4), range(4, 6)]
        write_rows(writer, SPEC, range(4))
        assert writer.missing() == [range(4, 6)]
        with pytest.raises(UnfinishedStoreError, match="2 of 6 rows"):
            writer.finish()
    store = FeatureStore(path)
    assert dict(store.teachers) == {}
    assert store.unfinished == ("small",)
    for ask in (
        lambda: store.read("small", "stage_1", [0]),
        lambda: store.valid("small"),
        lambda: store.statistics("small", "stage_1"),
        lambda: store.require(fingerprints={"small": SPEC.fingerprint()}),
    ):
        with pytest.raises(UnfinishedStoreError, match="1 of 2 shards are missing"):
            ask()


def test_reader_names_the_nearest(tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(3), SPEC)
    store = FeatureStore(tmp_path)
    with pytest.raises(StoreError, match="did you mean 'small'"):
        store.read("smal", "stage_1", [0])
    with pytest.raises(StoreError, match="did you mean 'stage_2' or 'stage_1'"):
        store.read("small", "stage_9", [0])
    with pytest.raises(StoreError, match="no grid or statistics of 'global'"):
        store.statistics("small", GLOBAL)
    for row in (-1, 3):
        with pytest.raises(StoreError, match=f"row {row} is not in the store, it has 3"):
            store.read("small", "stage_1", [row])


def test_reader_survives_pickling_and_threads(tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(12), SPEC, rows_per_shard=5)
    store: FeatureStore = pickle.loads(pickle.dumps(FeatureStore(tmp_path)))
    expected = sample_features(SPEC, range(12))["stage_2"].astype(np.float16)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda row: store.read("small", "stage_2", [row])[0], [*range(12)] * 20)
        np.testing.assert_array_equal(np.stack(list(found)), np.tile(expected, (20, 1, 1, 1)))


FORKED = """
import os, sys
import numpy as np
from store.reader import FeatureStore
store = FeatureStore(sys.argv[1])
expected = store.read("small", "stage_1", range(12))
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        for _ in range(50):
            rows = np.random.permutation(12)
            if not np.array_equal(store.read("small", "stage_1", rows), expected[rows]):
                os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_reader_survives_a_fork(tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(12), SPEC, rows_per_shard=5)
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], check=True)


def test_store_digest_follows_the_teachers_named(tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(3), SPEC)
    alone = FeatureStore(tmp_path).digest()
    write_store(tmp_path, sample_images(3), sample_teacher("second"))
    store = FeatureStore(tmp_path)
    assert sorted(store.teachers) == ["second", "small"]
    assert store.digest(["small"]) == alone
    assert store.digest() != alone


def test_adding_a_teacher_leaves_the_rest_alone(tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(3), SPEC)
    before = file_digests(tmp_path)
    write_store(tmp_path, sample_images(3), sample_teacher("second"))
    after = {
        name: digest for name, digest in file_digests(tmp_path).items() if "second/" not in name
    }
    assert after == before


def test_require_names_what_differs(tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(3), SPEC)
    store = FeatureStore(tmp_path)
    store.require(
        images_digest=sample_images(3).digest(),
        views_digest=sample_views(3).digest(),
        fingerprints={"small": SPEC.fingerprint()},
    )
    with pytest.raises(StoreMismatchError, match=r"(?s)images: store has digest.*extract-teach"):
        store.require(images_digest=sample_images(4).digest())
    with pytest.raises(StoreMismatchError, match="views: store has digest"):
        store.require(views_digest=sample_views(4).digest())
    with pytest.raises(StoreMismatchError, match=r"teacher 'small': .*\"model\":\"small\""):
        store.require(fingerprints={"small": "0" * 64})
    with pytest.raises(StoreError, match="teacher 'clip' is not in"):
        store.require(fingerprints={"clip": "0" * 64})


def test_writing_out_of_turn_is_refused(tmp_path: Path) -> None:
    create_store(tmp_path, sample_images(10), sample_views(10))
    with FeatureWriter.open(tmp_path, SPEC, sample_shard_bytes(SPEC, 4)) as writer:
        for rows, message in [
            (range(1, 4), "row the start of a shard comes next"),
            (range(3, 6), "row the start of a shard comes next"),
            (range(6), "cross the end of a shard"),
            (range(8, 12), "are no rows of this store"),
        ]:
            with pytest.raises(StoreError, match=message):
                write_rows(writer, SPEC, rows)
        write_rows(writer, SPEC, range(8, 10))
        with pytest.raises(StoreError, match="written already"):
            write_rows(writer, SPEC, range(8, 10))
        write_rows(writer, SPEC, range(2))
        with pytest.raises(StoreError, match="row 2 comes next"):
            write_rows(writer, SPEC, range(3, 4))
        assert writer.missing() == [range(4), range(4, 8)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65520.0, -70000.0])
def test_what_float16_cannot_hold_is_refused(tmp_path: Path, value: float) -> None:
    create_store(tmp_path, sample_images(4), sample_views(4))
    features = sample_features(SPEC, range(4))
    pooled = features.pop(GLOBAL)
    features["stage_2"][2, 1, 1, 3] = value
    message = r"level 'stage_2': 1 rows \(2\) "
    with FeatureWriter.open(tmp_path, SPEC) as writer:
        with pytest.raises(StoreError, match=message):
            writer.write(range(4), features, pooled, np.ones(4, bool))
        assert writer.missing() == [range(4)]
        valid = np.array([True, True, False, True])
        writer.write(range(4), features, pooled, valid)  # a quarantined row may hold anything
        writer.finish()
    with np.errstate(invalid="ignore"):
        found = FeatureStore(tmp_path).read("small", "stage_2", [0, 1, 3])
    np.testing.assert_array_equal(found, features["stage_2"][[0, 1, 3]].astype(np.float16))


def test_the_largest_float16_is_kept(tmp_path: Path) -> None:
    create_store(tmp_path, sample_images(1), sample_views(1))
    features = sample_features(SPEC, range(1))
    pooled = features.pop(GLOBAL)
    features["stage_1"][0, 0, 0, 0] = 65504
    with FeatureWriter.open(tmp_path, SPEC) as writer:
        writer.write(range(1), features, pooled, np.ones(1, bool))
        writer.finish()
    assert FeatureStore(tmp_path).read("small", "stage_1", [0]).max() == 65504


def test_wrong_shapes_and_names_are_refused(tmp_path: Path) -> None:
    create_store(tmp_path, sample_images(2), sample_views(2))
    features = sample_features(SPEC, range(2))
    pooled = features.pop(GLOBAL)
    good = np.ones(2, bool)
    with FeatureWriter.open(tmp_path, SPEC) as writer:
        with pytest.raises(StoreError, match="has stage_1, stage_2, global; got stage_1, stage_2"):
            writer.write(range(2), features, None, good)
        turned = {**features, "stage_1": features["stage_1"].swapaxes(1, 2)}
        with pytest.raises(StoreError, match=r"expected shape \(2, 3, 4, 6\), got \(2, 4, 3, 6\)"):
            writer.write(range(2), turned, pooled, good)
        with pytest.raises(StoreError, match=r"valid must have shape \(2,\), got \(1,\)"):
            writer.write(range(2), features, pooled, good[:1])


def test_every_image_quarantined_cannot_finish(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="every image of teacher 'small' is quarantined"):
        write_store(tmp_path, sample_images(2, quarantined=[0, 1]), SPEC)


def test_shards_have_the_asked_size_on_average() -> None:
    level = LevelSpec(name="a", grid=(12, 16), channels=96)
    spec = TeacherSpec(
        name="t", levels=(level, replace(level, name="b", channels=1)), provenance={}
    )
    layout = TeacherLayout(spec=spec, rows=9, rows_per_shard=1)
    assert with_rows_per_shard(layout, 128 * 2**20).rows_per_shard == 7206
    assert with_rows_per_shard(layout, 1).rows_per_shard == 1
    assert with_rows_per_shard(layout, 2**40).rows_per_shard == MAX_ROWS_PER_SHARD
