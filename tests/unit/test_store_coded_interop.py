"""Five Zarr readers see the same numbers, and a few lines of numpy decode them as our reader does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import dask.array
import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from store.inspect import open_dask, open_xarray, summarise
from store.reader import FeatureStore
from store.spec import GLOBAL
from store.testing import sample_images, sample_teacher, write_store

ROWS, BAD = 7, 5
CODECS = ["float16", "float32", "int8", "int8-pca", "pca-4bit"]
Read = Callable[[Path, str], np.ndarray]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of four rows, the last one short; of `wide`, one shard that is short."""
    path = tmp_path_factory.mktemp("coded") / "store.zarr"
    images = sample_images(ROWS, quarantined=[BAD])
    for codec in CODECS:
        spec = sample_teacher(codec, codec=codec, pyramid=True)
        write_store(path, images, spec, rows_per_shard=4, covariance=codec == "int8")
    spec = sample_teacher("wide", codec="pca-4bit")
    write_store(path, images, spec, rows_per_shard=100)
    return path


def with_zarr(path: Path, component: str) -> np.ndarray:
    return np.asarray(zarr.open_array(path, path=component, mode="r")[...])


def with_zarrs(path: Path, component: str) -> np.ndarray:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(path, path=component, mode="r")
        assert type(array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
        return np.asarray(array[...])


def with_dask(path: Path, component: str) -> np.ndarray:
    return np.asarray(dask.array.from_zarr(str(path), component=component).compute())


def with_xarray(path: Path, component: str) -> np.ndarray:
    group, _, name = component.rpartition("/")
    return np.asarray(xarray.open_zarr(path, group=group, consolidated=False)[name].values)


def with_tensorstore(path: Path, component: str) -> np.ndarray:
    address = {"driver": "file", "path": str(path / component)}
    array = tensorstore.open({"driver": "zarr3", "kvstore": address}, read=True).result()
    return np.asarray(array.read().result())


FOREIGN: list[Read] = [with_zarrs, with_dask, with_xarray, with_tensorstore]


def arrays_below(path: Path) -> Iterator[str]:
    group = zarr.open_group(path, mode="r")
    yield from (name for name, _ in group.members(max_depth=None) if (path / name).is_dir()
                and isinstance(group[name], zarr.Array))  # fmt: skip


def test_five_readers_see_the_same_numbers(path: Path) -> None:
    components = list(arrays_below(path))
    kinds = {tuple(name.split("/")[2:-1]) or name.split("/")[-1] for name in components}
    assert {"native", "2x2", "1x1", ("codec", "native"), ("stats", "2x2")} <= {*kinds}
    assert len(components) > 100
    for component in components:
        expected = with_zarr(path, component)
        for read in FOREIGN:
            found = read(path, component)
            assert found.dtype == expected.dtype, (read, component)
            np.testing.assert_array_equal(found, expected, f"{read.__name__} {component}")


def decode(path: Path, teacher: str, level: str, resolution: str) -> np.ndarray:
    """Decode with what the docstrings of the codecs say, and nothing of ours."""
    codes = with_zarr(path, f"{teacher}/{level}/{resolution}")
    if codes.dtype.kind == "f":
        return codes
    folder = path / teacher / level / "codec" / resolution
    c = {p.name: with_zarr(folder, p.name) for p in folder.iterdir() if p.is_dir()}
    if codes.dtype == np.int8:
        codes = codes.astype("float32")
        values = codes * abs(codes) * c["scale"]
        return (values @ c["rotation"] if "rotation" in c else values) + c["offset"]
    steps = (codes[..., c["byte"]] >> c["shift"]) & c["mask"]
    blocks = c["table"][c["first"] + steps] @ c["rotation"].astype("float32") + c["mean"]
    n, h, w, values, b = *blocks.shape, int(c["block"])
    tokens = blocks.reshape(n, h, w, b, b, values // b**2).swapaxes(2, 3)
    tokens = tokens.reshape(n, h * b, w * b, -1)
    return tokens * np.linalg.norm(tokens, axis=-1, keepdims=True)


@pytest.mark.parametrize("teacher", [*CODECS, "wide"])
def test_two_lines_of_numpy_decode_as_our_reader_does(path: Path, teacher: str) -> None:
    store = FeatureStore(path)
    good = np.flatnonzero(store.valid(teacher))
    assert good.tolist() == [row for row in range(ROWS) if row != BAD]
    for target in store.teachers[teacher].targets:
        plain = decode(path, teacher, target.level, target.resolution)
        ours = store.read(teacher, target.level, good, target.grid)
        # Products of matrices of other heights round differently in the last bits.
        tolerance = 0 if teacher in ("float16", "float32", "int8") else 1e-5
        np.testing.assert_allclose(plain[good], ours, rtol=tolerance, atol=10 * tolerance)
        lazy = open_dask(path, teacher, target.level, target.grid)
        assert len(lazy.chunks[0]) == (1 if teacher == "wide" else 2)
        assert lazy.dtype == ours.dtype
        np.testing.assert_array_equal(lazy.compute()[good], ours)
    pooled = store.read(teacher, GLOBAL, good)
    np.testing.assert_array_equal(with_tensorstore(path, f"{teacher}/global")[good], pooled)
    assert pooled.dtype == ("float32" if teacher == "float32" else "float16")


def test_xarray_decodes_too_and_the_summary_names_the_codec(path: Path) -> None:
    data = open_xarray(path, "pca-4bit")
    expected = FeatureStore(path).read("pca-4bit", "stage_2", [0, 6])
    np.testing.assert_array_equal(data["stage_2"][[0, 6]], expected)
    teachers = {teacher.name: teacher for teacher in summarise(path).teachers}
    levels = {level.name: level for level in teachers["pca-4bit"].levels}
    assert levels["stage_2/native"].codec == "pca-4bit"
    assert levels["stage_2/native"].shape == (2, 2, 8)
    assert levels["stage_2/native"].row_bytes == 2 * 2 * 8 // 2
    assert levels["stage_2/native"].fidelity is not None
    assert levels["global"].codec == "float16"
