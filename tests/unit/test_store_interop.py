"""Plain zarr, dask and xarray open a store, without a warning, and read the very same numbers."""

import subprocess
import sys
from pathlib import Path

import dask.array
import numpy as np
import pytest
import xarray
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from store.errors import UnfinishedStoreError
from store.inspect import open_dask, open_xarray, summarise
from store.spec import GLOBAL
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
LEVELS = ["stage_1/native", "stage_2/native", GLOBAL]


def features(component: str) -> np.ndarray:
    values = sample_features(SPEC, range(ROWS))[component.removesuffix("/native")]
    stored = values.astype(np.float16)
    stored[7] = 0
    return stored


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interop") / "store.zarr"
    images = sample_images(ROWS, quarantined=[7])
    write_store(path, images, SPEC, rows_per_shard=4, covariance=True)
    return path


@pytest.mark.parametrize("component", LEVELS)
def test_zarr_reads_the_same(path: Path, component: str) -> None:
    array = zarr.open_array(path, path=f"small/{component}", mode="r")
    np.testing.assert_array_equal(array[...], features(component))
    np.testing.assert_array_equal(array[6:9], features(component)[6:9])
    assert array.chunks == (1, *array.shape[1:])
    assert array.shards == (4, *array.shape[1:])


@pytest.mark.parametrize("component", LEVELS)
def test_shard_files_are_what_zarr_itself_writes(path: Path, component: str) -> None:
    values = features(component)
    files: dict[str, zarr.core.buffer.Buffer] = {}
    array = zarr.create_array(
        MemoryStore(files),
        shape=values.shape,
        dtype="float16",
        chunks=(1, *values.shape[1:]),
        shards=(4, *values.shape[1:]),
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=np.nan,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    for start in range(0, ROWS, 4):
        array[start : start + 4] = values[start : start + 4]
    ours = {
        file.name: file.read_bytes()
        for file in (path / "small" / component).iterdir()
        if file.name != "zarr.json"
    }
    assert len(ours) == 3
    assert ours == {k: v.to_bytes() for k, v in files.items() if k != "zarr.json"}
    opened = zarr.open_array(path, path=f"small/{component}", mode="r")
    assert opened.metadata.codecs == array.metadata.codecs


@pytest.mark.parametrize("component", LEVELS)
def test_dask_reads_the_same(path: Path, component: str) -> None:
    lazy = dask.array.from_zarr(str(path), component=f"small/{component}")
    np.testing.assert_array_equal(lazy.compute(), features(component))


@pytest.mark.parametrize("level", ["stage_1", "stage_2"])
def test_xarray_reads_the_same(path: Path, level: str) -> None:
    data = xarray.open_zarr(path, group=f"small/{level}", consolidated=False)
    assert data["native"].dims == ("row", "y", "x", "channel")
    np.testing.assert_array_equal(data["native"].values, features(level))
    stats = xarray.open_zarr(path, group=f"small/{level}/stats/native", consolidated=False)
    tokens = np.delete(features(level), 7, axis=0).astype(np.float64)
    np.testing.assert_allclose(stats["mean"], tokens.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(stats["variance"], tokens.var(axis=(0, 1, 2)), rtol=1e-6)
    assert int(stats["count"]) == tokens[..., 0].size
    assert stats["covariance"].dims == ("channel", "other_channel")
    covariance = zarr.open_array(path, path=f"small/{level}/stats/native/covariance", mode="r")[...]
    expected = np.cov(tokens.reshape(-1, tokens.shape[-1]), rowvar=False, bias=True)
    np.testing.assert_allclose(covariance, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(stats["covariance"].values, covariance)


def test_tables_open_everywhere(path: Path) -> None:
    images = xarray.open_zarr(path, group="images", consolidated=False).load()
    ids = [bytes(row).rstrip(b"\0").decode() for row in images["id"].values]
    assert tuple(ids) == sample_images(ROWS).ids
    assert images["height"].values.tolist() == [480] * ROWS
    views = xarray.open_zarr(path, group="views", consolidated=False).load()
    assert views["box"].dims == ("row", "side")
    assert views["seed"].values.tolist() == list(range(ROWS))
    assert not views["flip"].values.any()
    marks = dask.array.from_zarr(str(path), component="small/valid").compute()
    assert marks.tolist() == [1] * 7 + [2] + [1] * 3
    for component in ("commit/digest", "commit/statistics", "commit/covariance"):
        assert zarr.open_array(path, path=f"small/{component}", mode="r")[...].shape[0] == 3
    assert zarr.open_group(path, mode="r").attrs["format"] == "sak-features"
    assert zarr.open_group(path, path="small", mode="r").attrs["finished"] is True


def test_unwritten_rows_poison_a_plain_mean(tmp_path: Path) -> None:
    create_store(tmp_path, sample_images(6), sample_views(6))
    with FeatureWriter.open(tmp_path, SPEC, sample_shard_bytes(SPEC, 4)) as writer:
        write_rows(writer, SPEC, range(4))
    lazy = dask.array.from_zarr(str(tmp_path), component="small/stage_1/native")
    assert np.isnan(lazy.astype("float32").mean().compute())
    with pytest.raises(UnfinishedStoreError, match="not finished"):
        open_dask(tmp_path, "small", "stage_1")
    with pytest.raises(UnfinishedStoreError, match="not finished"):
        open_xarray(tmp_path, "small")
    summary = summarise(tmp_path).teachers[0]
    assert (summary.finished, summary.coverage) == (False, pytest.approx(4 / 6))


def test_open_dask_has_a_block_per_shard(path: Path) -> None:
    lazy = open_dask(path, "small", "stage_2")
    assert lazy.chunks == ((4, 4, 3), (2,), (2,), (8,))
    assert lazy.dtype == np.float16
    np.testing.assert_array_equal(lazy.compute(), features("stage_2"))


def test_open_xarray_names_the_rows(path: Path) -> None:
    data = open_xarray(path, "small")
    assert data["stage_1"].dims == ("row", "y_stage_1", "x_stage_1", "channel_stage_1")
    assert data["global"].dims == ("row", "channel_global")
    assert data["image"].values.tolist() == list(sample_images(ROWS).ids)
    chosen = data.swap_dims(row="image").sel(image="room/0003-é")["stage_2"]
    np.testing.assert_array_equal(chosen, features("stage_2")[3])
    mean = data["stage_1"].where(data["valid"]).astype("float32").mean("row")
    expected = np.delete(features("stage_1"), 7, axis=0).astype(np.float32).mean(axis=0)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_summary_counts_everything(path: Path) -> None:
    summary = summarise(path).to_json()
    assert summary["images"] == ROWS
    assert summary["quarantined"] == {"room/0007-é": "zero bytes"}
    assert summary["bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    (teacher,) = summary["teachers"]
    assert (teacher["finished"], teacher["coverage"], teacher["quarantined"]) == (True, 1.0, 1)
    assert (teacher["shards"], teacher["rows_per_shard"]) == (3, 4)
    assert [level["shape"] for level in teacher["levels"]] == [(3, 4, 6), (2, 2, 8), (5,)]
    assert teacher["provenance"]["model"] == "small"
    assert teacher["fingerprint"] == SPEC.fingerprint()


def test_store_needs_no_torch_and_reading_no_zarr() -> None:
    code = (
        "import sys, store.reader, store.writer; assert 'zarr' not in sys.modules;"
        "import store.inspect; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
