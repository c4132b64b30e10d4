"""Images in tars and at URLs, from `sak index` to a trained student, and sources that fail."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.testing import sak, sak_json
from stages.data import places
from store.reader import FeatureStore


def picture(value: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def params_of(tiny_params: Path, data: dict[str, object]) -> Path:
    values = yaml.safe_load(tiny_params.read_text())
    del values["teachers"]["second"]
    tiny_params.write_text(yaml.safe_dump(values | {"data": data, "tasks": []}))
    return tiny_params


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_sleep", lambda seconds: None)


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.pipe({f"/pictures/{index}.png": picture(index) for index in range(6)})
    yield files
    files.rm("/pictures", recursive=True)


def test_tars_from_index_to_student(tiny_params: Path, tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for key in range(3):
                content = picture(10 * shard + key) if (shard, key) != (1, 1) else b"no image"
                info = tarfile.TarInfo(f"{key}.png")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    data: dict[str, object] = {
        "kind": "webdataset",
        "shards": [f"{tmp_path}/{{0..1}}.tar"],
        "index": f"{tmp_path}/members.parquet",
    }
    params = params_of(tiny_params, data)
    found = sak_json("index", "--params", params)
    assert found["quarantined"] == {"1/1": "not an image that Pillow knows"}
    (done,) = sak_json("extract-teachers", "--params", params)["teachers"]
    assert (done["images"], done["quarantined"]) == (5, 1)
    assert FeatureStore(tmp_path / "features.zarr").images.ids[0] == "0/0"
    assert sak_json("train-student", "distill", "--params", params)["steps"] == 3

    data["shards"] = [f"{tmp_path}/1.tar", f"{tmp_path}/0.tar"]  # the same images
    again = sak_json("index", "--params", params_of_data(tiny_params, data))
    assert again["images_digest"] == found["images_digest"]


def params_of_data(tiny_params: Path, data: dict[str, object]) -> Path:
    values = yaml.safe_load(tiny_params.read_text()) | {"data": data}
    tiny_params.write_text(yaml.safe_dump(values))
    return tiny_params


def test_a_source_that_fails_stops_extraction_which_resumes(
    memory: Any, tiny_params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_of(tiny_params, {"kind": "folder", "root": "memory://pictures"})
    sak("index", "--params", params)
    store = tmp_path / "features.zarr"
    broken, real = ["/pictures/3.png"], type(memory).cat_file

    def cat_file(self: Any, path: str, *rest: Any, **options: Any) -> Any:
        if path in broken:
            raise ConnectionError("the line went dead")
        return real(self, path, *rest, **options)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    stopped = " ".join(sak("extract-teachers", "--params", params, code=2).split())
    assert "image '3' could not be fetched, tried again and again" in stopped
    assert "run the same command again when its source answers" in stopped
    assert FeatureStore(store).unfinished == ("first",)
    broken.clear()
    sak("extract-teachers", "--params", params)
    assert list(FeatureStore(store).teachers) == ["first"]
    assert FeatureStore(store).valid("first").all()

    memory.pipe("/pictures/3.png", picture(99))
    for mark in (store / "first" / "valid").rglob("c*"):
        if mark.is_file():
            mark.unlink()
    changed = sak("extract-teachers", "--params", params, code=2)
    assert "changed since it was indexed" in changed


def test_a_source_that_fails_at_index_is_quarantined_and_let_in_later(
    memory: Any, tiny_params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_of(tiny_params, {"kind": "folder", "root": "memory://pictures"})
    real = type(memory).cat_file

    def cat_file(self: Any, path: str, *rest: Any, **options: Any) -> Any:
        if path == "/pictures/3.png":
            raise TimeoutError
        return real(self, path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", cat_file)
        assert sak_json("index", "--params", params)["quarantined"] == {
            "3": "cannot be fetched: TimeoutError"
        }
    assert sak_json("index", "--retry-quarantined", "--params", params)["admitted"] == ["3"]
    sak("extract-teachers", "--params", params)
    assert FeatureStore(tmp_path / "features.zarr").valid("first").all()
