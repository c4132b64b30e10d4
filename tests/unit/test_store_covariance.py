"""Covariance on request: what it adds to a store, what it leaves alone, when it is refused."""

from pathlib import Path

import pytest

from store.errors import StoreError, StoreMismatchError
from store.normalise import phi_s, whitening, z_score
from store.reader import FeatureStore
from store.testing import (
    file_digests,
    sample_images,
    sample_shard_bytes,
    sample_teacher,
    write_rows,
    write_store,
)
from store.writer import FeatureWriter

SPEC = sample_teacher()
SIZE = sample_shard_bytes(SPEC, 4)


def test_covariance_only_adds_its_own_files(tmp_path: Path) -> None:
    write_store(tmp_path / "plain", sample_images(6), SPEC)
    write_store(tmp_path / "more", sample_images(6), SPEC, covariance=True)
    plain, more = file_digests(tmp_path / "plain"), file_digests(tmp_path / "more")
    added = more.keys() - plain.keys()
    assert added == {
        *(f"small/commit/covariance/{name}" for name in ("zarr.json", "c.0.0", "c.1.0")),
        *(f"small/{level}/stats/native/covariance/zarr.json" for level in ("stage_1", "stage_2")),
        *(f"small/{level}/stats/native/covariance/c.0.0" for level in ("stage_1", "stage_2")),
    }
    changed = {name for name in plain if plain[name] != more.get(name)}
    assert changed == {"small/zarr.json"}
    one, other = FeatureStore(tmp_path / "plain"), FeatureStore(tmp_path / "more")
    assert one.digest() == other.digest()  # students of the one may go on with the other


def test_lower_triangle_is_stored(tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(4), SPEC, covariance=True)
    entries = 6 * 7 // 2 + 8 * 9 // 2
    size = (tmp_path / "small" / "commit" / "covariance" / "c.0.0").stat().st_size
    assert size == 8 * entries + 4


def test_store_without_covariance_normalises_by_z_score_only(tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(4), SPEC)
    statistics = FeatureStore(tmp_path).statistics("small", "stage_1")
    assert statistics.covariance is None
    assert z_score(statistics).matrix.shape == (6,)
    for normalise in (phi_s, whitening):
        with pytest.raises(StoreError, match=r"(?s)covariance: true.*sak extract-teachers .*repl"):
            normalise(statistics)


def test_covariance_asked_for_too_late_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(4), SPEC)
    with pytest.raises(StoreMismatchError, match=r"(?s)covariance: .*asked for True.*delete"):
        FeatureWriter.open(tmp_path, SPEC, covariance=True)


def test_covariance_once_begun_is_kept(tmp_path: Path) -> None:
    write_store(tmp_path / "whole", sample_images(6), SPEC, covariance=True)
    write_store(tmp_path / "store", sample_images(6), SPEC, covariance=True)
    path = tmp_path / "store"
    (path / "small" / "valid" / "c.1").unlink()
    with FeatureWriter.open(path, SPEC, SIZE) as writer:
        write_rows(writer, SPEC, range(4, 6))
        writer.finish()
    assert file_digests(path) == file_digests(tmp_path / "whole")


def test_lost_covariance_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path, sample_images(4), SPEC, covariance=True)
    (tmp_path / "small" / "stage_1" / "stats" / "native" / "covariance" / "c.0.0").unlink()
    with pytest.raises(StoreError, match=r"covariance/c\.0\.0 is missing"):
        FeatureStore(tmp_path).statistics("small", "stage_1")
