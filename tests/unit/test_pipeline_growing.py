"""`sak index --append`, `sak gc` and the list of quarantined images, as a person types them."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.testing import sak, sak_json
from store.reader import FeatureStore
from store.testing import sample_images, sample_teacher, sample_views, write_store
from store.writer import FeatureWriter, create_store


def paint(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        pixels = np.full((40, 50, 3), sum(name.encode()) % 256, np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")


@pytest.fixture
def params(tiny_params: Path, tmp_path: Path) -> Path:
    """A folder of four unlabelled pictures and one teacher."""
    values = yaml.safe_load(tiny_params.read_text())
    del values["teachers"]["second"]
    values |= {"data": {"kind": "folder", "root": str(tmp_path / "pictures")}, "tasks": []}
    tiny_params.write_text(yaml.safe_dump(values))
    paint(tmp_path / "pictures", "a", "c", "e", "g")
    return tiny_params


def test_a_store_grows_with_its_folder(params: Path, tmp_path: Path) -> None:
    store, pictures, options = (
        tmp_path / "features.zarr",
        tmp_path / "pictures",
        ("--params", params),
    )
    assert sak_json("index", "--append", *options)["images"] == 4  # made where there is none
    sak("extract-teachers", *options)
    before = FeatureStore(store).read("first", "block_03", range(4))
    paint(pictures, "b", "h")
    assert "sak index --append" in sak("index", *options, code=2)
    assert "sak index --append" in sak("extract-teachers", *options, code=2)
    assert sak_json("index", "--append", *options)["images"] == 6
    assert FeatureStore(store).images.ids == ("a", "c", "e", "g", "b", "h")
    (done,) = sak_json("extract-teachers", *options)["teachers"]
    assert (done["images"], done["already_there"]) == (6, 0)  # one shard, short, rebuilt
    after = FeatureStore(store).read("first", "block_03", range(6))
    np.testing.assert_array_equal(after[:4], before)
    assert sak_json("index", "--append", *options)["images"] == 6
    assert sak_json("extract-teachers", *options)["teachers"][0]["images"] == 0


def test_stored_images_that_are_gone_or_changed_are_refused(params: Path, tmp_path: Path) -> None:
    options = ("--params", params)
    sak("index", *options)
    pictures = tmp_path / "pictures"
    paint(pictures, "x")
    (pictures / "c.png").write_bytes((pictures / "a.png").read_bytes())
    refused = sak("index", "--append", *options, code=2)
    assert "first difference in sha256, image 1" in refused
    (pictures / "c.png").unlink()
    assert "1 stored images are gone, such as 'c'" in sak("index", "--append", *options, code=2)
    assert len(FeatureStore(tmp_path / "features.zarr").images) == 4


def test_gc_keeps_the_teachers_of_the_parameter_file(params: Path, tmp_path: Path) -> None:
    store, options = tmp_path / "features.zarr", ("--params", params)
    for name in ("first", "old"):
        write_store(store, sample_images(4), sample_teacher(name))
    listed = sak_json("gc", *options)
    assert [(Path(one["path"]).name, one["busy"]) for one in listed["found"]] == [("old", False)]
    assert (store / "old").exists()
    assert "to free with --delete" in sak("gc", *options)
    assert sak_json("gc", store)["found"] == []  # a store alone says nothing about its teachers
    assert sak_json("gc", "--delete", *options) == {**listed, "deleted": True}
    assert list(FeatureStore(store).teachers) == ["first"]
    assert "did you mean 'first'" in sak("gc", store, "--teacher", "frst", code=2)
    assert "freed" in sak("gc", store, "--teacher", "first", "--delete")
    assert not (store / "first").exists()


def test_gc_leaves_a_teacher_that_is_written(params: Path, tmp_path: Path) -> None:
    store = tmp_path / "features.zarr"
    write_store(store, sample_images(4), sample_teacher("old"))
    with FeatureWriter.open(store, sample_teacher("old")):
        assert "in use, left alone" in sak("gc", "--delete", "--params", params)
    assert list(FeatureStore(store).teachers) == ["old"]


def test_quarantined_images_are_capped_and_listed(tmp_path: Path) -> None:
    bad = range(1, 26)
    create_store(tmp_path / "store", sample_images(30, quarantined=bad), sample_views(30))
    shown = sak("inspect", tmp_path / "store")
    assert shown.count("quarantined: ") == 20
    assert "and 5 more, `--quarantined` lists all" in shown
    listed = sak("inspect", tmp_path / "store", "--quarantined")
    assert listed.count("zero bytes") == 25
    assert "25 of 30 images" in listed
    found = sak_json("inspect", tmp_path / "store", "--quarantined")
    assert found["images"] == 30
    assert found["quarantined"] == {f"room/{index:04d}-é": "zero bytes" for index in bad}
