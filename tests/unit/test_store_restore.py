"""Codecs whose description or arrays were swapped, cut or invented are refused, before allocating."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store.chunks import write_array
from store.codecs import Codec
from store.errors import StoreDamagedError, StoreError
from store.fit import fit_codec
from store.reader import FeatureStore
from store.restore import restore_codec
from store.stored_codecs import describe_codec, read_codec, write_codec
from store.teacher_layout import codec_layouts
from store.testing import sample_codecs, sample_images, sample_teacher, write_store

Arrays = dict[str, np.ndarray]
CHANNELS = 4
HUGE = 2**60


@lru_cache
def fitted(name: str) -> Codec:
    tiles = np.random.default_rng(0).normal(size=(64, 2, 2, CHANNELS)).astype(np.float32)
    return fit_codec(name, tiles)


@pytest.mark.parametrize("name", ["int8", "int8-hadamard", "int8-pca3", "pca-2bit"])
def test_a_codec_comes_back(name: str) -> None:
    codec = fitted(name)
    restored = restore_codec(name, codec.parameters(), CHANNELS)
    assert type(restored) is type(codec)
    row = np.random.default_rng(1).normal(size=(4, 2, CHANNELS)).astype(np.float32)
    codes = codec.encode(row)
    np.testing.assert_array_equal(restored.encode(row), codes)
    np.testing.assert_array_equal(restored.decode(codes), codec.decode(codes))


def put(key: str, index: Any, value: Any) -> Callable[[Arrays], object]:
    def change(arrays: Arrays) -> None:
        arrays[key] = arrays[key].copy()
        arrays[key][index] = value

    return change


LOW_RATE: dict[str, Callable[[Arrays], object]] = {
    "block 0": put("block", (), 0),
    "block 1 of a wider transform": put("block", (), 1),
    "block 3": put("block", (), 3),
    "block -2": put("block", (), -2),
    "byte beyond": put("byte", 0, 2**31 - 1),
    "byte negative": put("byte", 0, -1),
    "shift beyond": put("shift", 0, 8),
    "mask of a shift beyond": put("shift", 0, 7),
    "mask 0": put("mask", 0, 0),
    "mask with a hole": put("mask", 0, 5),
    "overlap": lambda a: a.update(byte=np.zeros_like(a["byte"]), shift=np.zeros_like(a["shift"])),
    "first beyond": put("first", -1, 2**31 - 1),
    "first negative": put("first", 0, -1),
    "table cut": lambda a: a.update(table=a["table"][:-1]),
    "NaN in rotation": put("rotation", (0, 0), np.nan),
    "infinity in mean": put("mean", 0, np.inf),
    "NaN in table": put("table", 0, np.nan),
    "dtype": lambda a: a.update(rotation=a["rotation"].astype(np.float64)),
    "mean missing": lambda a: a.pop("mean"),
    "one more": lambda a: a.update(scale=a["mean"]),
    "rows cut": lambda a: a.update(rotation=a["rotation"][1:]),
    "columns cut": lambda a: a.update(rotation=a["rotation"][:, :-1], mean=a["mean"][:-1]),
    "no components": lambda a: a.update({k: a[k][:0] for k in ("byte", "shift", "mask", "first")}),
    "not flat": lambda a: a.update(byte=a["byte"][:, None]),
}

INT8: dict[str, Callable[[Arrays], object]] = {
    "scale 0": put("scale", 1, 0),
    "scale negative": put("scale", 1, -1),
    "NaN in scale": put("scale", 1, np.nan),
    "infinity in offset": put("offset", 1, np.inf),
    "NaN in rotation": put("rotation", (0, 0), np.nan),
    "turned": lambda a: a.update(rotation=a["rotation"].T),
    "another kept": lambda a: a.update(scale=a["scale"][:2], rotation=a["rotation"][:2]),
    "offset cut": lambda a: a.update(offset=a["offset"][:3]),
    "swapped": lambda a: a.update(scale=a["offset"], offset=a["scale"]),
    "dtype": lambda a: a.update(scale=a["scale"].astype(np.float64)),
    "rotation missing": lambda a: a.pop("rotation"),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [*(("pca-2bit", one) for one in LOW_RATE), *(("int8-pca3", one) for one in INT8)],
)
def test_arrays_that_do_not_fit_are_refused(name: str, change: str) -> None:
    arrays = dict(fitted(name).parameters())
    (LOW_RATE if name == "pca-2bit" else INT8)[change](arrays)
    with pytest.raises(StoreDamagedError, match=f"codec {name}|low-rate"):
        restore_codec(name, arrays, CHANNELS)


def test_arrays_of_other_codecs_and_levels_are_refused() -> None:
    for name in ("int8", "int8-hadamard", "pca-2bit", "float16"):
        with pytest.raises(StoreDamagedError, match=f"codec {name}|low-rate"):
            restore_codec(name, fitted("int8-pca3").parameters(), CHANNELS)
    for name in ("int8", "int8-pca3", "pca-2bit"):
        with pytest.raises(StoreDamagedError):
            restore_codec(name, fitted(name).parameters(), 2)
    with pytest.raises(StoreError, match="there is no codec"):
        restore_codec("zip", {}, 1)


def test_arrays_on_disk_must_be_those_recorded(tmp_path: Path) -> None:
    spec = sample_teacher(codec="int8-pca")
    codecs = sample_codecs(spec)
    others = sample_codecs(spec, first_row=50)
    first, second = spec.targets
    for target in spec.targets:
        stored = describe_codec(spec.codec, target, codecs[target.name])
        write_codec(tmp_path, target, stored, codecs[target.name])
        read = read_codec(tmp_path, target, stored)
        assert read.fidelity == codecs[target.name].fidelity
    stored = describe_codec(spec.codec, first, codecs[first.name])
    layouts = codec_layouts(first, stored)
    write_array(tmp_path, layouts["scale"], others[first.name].codec.parameters()["scale"])
    with pytest.raises(StoreDamagedError, match="does not have the digest"):
        read_codec(tmp_path, first, stored)
    with pytest.raises(StoreDamagedError, match="should be"):
        read_codec(tmp_path, first, describe_codec(spec.codec, second, codecs[second.name]))


def stored_codec(document: dict[str, Any], target: str = "stage_2/native") -> dict[str, Any]:
    codec: dict[str, Any] = document["attributes"]["codecs"][target]
    return codec


def form(name: str, dtype: str, shape: list[int]) -> Callable[[dict[str, Any]], object]:
    return lambda d: stored_codec(d)["parameters"].update({name: [dtype, shape]})


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "name of another": lambda d: stored_codec(d).update(name="int8"),
    "name of none": lambda d: stored_codec(d).update(name="../x"),
    "plain floats": lambda d: stored_codec(d).update(name="float16"),
    "dtype": lambda d: stored_codec(d).update(dtype="<f8"),
    "no dtype": lambda d: stored_codec(d).update(dtype="O"),
    "huge row": lambda d: stored_codec(d).update(row_shape=[HUGE, HUGE, HUGE]),
    "huge last": lambda d: stored_codec(d)["row_shape"].__setitem__(2, HUGE),
    "wide row": lambda d: stored_codec(d)["row_shape"].append(1),
    "no row": lambda d: stored_codec(d).update(row_shape=[]),
    "row of text": lambda d: stored_codec(d).update(row_shape="2"),
    "path": form("../../../../x", "<f4", [4]),
    "absolute path": form("/tmp/x", "<f4", [4]),
    "huge array": form("table", "<f4", [HUGE]),
    "huge transform": form("mean", "<f4", [HUGE]),
    "huge rotation": form("rotation", "<f2", [HUGE, HUGE]),
    "text": form("mean", "O", [4]),
    "scalar": form("mean", "<f4", []),
    "zero": form("mean", "<f4", [0]),
    "negative": form("mean", "<f4", [-1]),
    "no fidelity": lambda d: stored_codec(d)["parameters"].pop("fidelity"),
    "wide fidelity": form("fidelity", "<f8", [HUGE]),
    "list": lambda d: d["attributes"].update(codecs=[]),
    "list of parameters": lambda d: stored_codec(d).update(parameters=[]),
    "none": lambda d: d["attributes"].update(codecs={}),
    "one missing": lambda d: d["attributes"]["codecs"].pop("stage_2/native"),
    "one more": lambda d: d["attributes"]["codecs"].update({"../x": stored_codec(d)}),
    "swapped": lambda d: d["attributes"]["codecs"].update(
        {"stage_1/native": stored_codec(d), "stage_2/native": stored_codec(d, "stage_1/native")}
    ),
}


@pytest.fixture(scope="module", params=["pca-4bit", "int8-pca"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("restore") / "store"
    write_store(path, sample_images(3), sample_teacher(codec=request.param))
    return path


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_description_is_refused_on_opening(whole: Path, change: str) -> None:
    path = whole / "small" / "zarr.json"
    before = path.read_text()
    document = json.loads(before)
    HOSTILE[change](document)
    try:
        path.write_text(json.dumps(document))
        with pytest.raises(StoreDamagedError, match=r"zarr\.json is damaged|contradicts itself"):
            FeatureStore(whole)
    finally:
        path.write_text(before)
    FeatureStore(whole).read("small", "stage_2", [0])
