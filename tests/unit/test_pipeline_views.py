"""`views:` in the parameter file, as a person meets it: index, append, plan, inspect, train."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import planning
from pipeline.testing import sak
from store.reader import FeatureStore

VIEWS = {"count": 3, "area": [0.3, 0.9], "flip": 0.5, "photometric": {"brightness": 0.2}}


def edit(path: Path, **changes: Any) -> Path:
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def paint(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        generator = np.random.default_rng(sum(name.encode()))
        pixels = generator.integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")


@pytest.fixture
def params(tiny_params: Path, tmp_path: Path) -> Path:
    """A folder of four unlabelled pictures, three views of each, one teacher."""
    values = yaml.safe_load(tiny_params.read_text())
    del values["teachers"]["second"]
    paint(tmp_path / "pictures", "a", "c", "e", "g")
    return edit(
        tiny_params,
        teachers=values["teachers"],
        data={"kind": "folder", "root": str(tmp_path / "pictures")},
        tasks=[],
        views=VIEWS,
    )


def test_views_are_drawn_planned_extracted_shown_and_trained_on(
    params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "LADDER", ("float32",))
    monkeypatch.setattr(planning, "DISK_BYTES", 2**20)
    path, options = tmp_path / "features.zarr", ("--params", params)
    indexed = json.loads(sak("index", *options, "--json"))
    assert (indexed["images"], indexed["views_per_image"]) == (4, 3)
    planned = json.loads(sak("plan", *options, "--measure-images", "4", "--json"))["plan"]
    assert (planned["images"], planned["views_per_image"]) == (4, 3)
    assert "3 per image" in sak("plan", *options, "--measure-images", "4")
    (done,) = json.loads(sak("extract-teachers", *options, "--json"))["teachers"]
    assert done["images"] == 12
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    assert (sum(sizes), len(sizes)) == (planned["bytes"], planned["files"])
    store = FeatureStore(path)
    assert store.read("first", "block_03", range(12)).shape == (12, 4, 6, 24)
    mirrored = int(store.views.flips.sum())
    assert 0 < mirrored < 8
    shown = " ".join(sak("inspect", path).split())
    assert f"4 images as 3 32 x 48 views each ({mirrored / 12:.0%} mirrored, colours" in shown
    summary = json.loads(sak("inspect", path, "--json"))
    assert (summary["flipped"], summary["photometric"]) == (mirrored, True)
    assert json.loads(sak("verify", path, "--json"))["clean"]
    trained = json.loads(sak("train-student", "distill", *options, "--json"))
    assert trained["images"] == 4


def test_appended_images_get_their_views_and_the_others_keep_theirs(
    params: Path, tmp_path: Path
) -> None:
    path, options = tmp_path / "features.zarr", ("--params", params)
    sak("index", *options)
    sak("extract-teachers", *options)
    views = FeatureStore(path).views
    old = FeatureStore(path).read("first", "block_03", range(12))
    paint(tmp_path / "pictures", "b", "z")
    sak("index", "--append", *options)
    sak("extract-teachers", *options)
    after = FeatureStore(path)
    assert after.images.ids == ("a", "c", "e", "g", "b", "z")
    assert after.views.first(12) == views
    np.testing.assert_array_equal(after.read("first", "block_03", range(12)), old)
    edit(params, store=str(tmp_path / "anew.zarr"))
    sak("index", *options)
    anew = FeatureStore(tmp_path / "anew.zarr")
    row, other = after.row("b", 2), anew.row("b", 2)
    assert row != other
    np.testing.assert_array_equal(anew.views.boxes[other], after.views.boxes[row])
    assert anew.views.seeds[other] == after.views.seeds[row]


@pytest.mark.parametrize(
    "change", [{"count": 2}, {"seed": 1}, {"photometric": None}, {"area": [0.5, 0.9]}]
)
def test_views_of_other_settings_are_refused_everywhere(
    params: Path, change: dict[str, Any]
) -> None:
    options = ("--params", params)
    sak("index", *options)
    edit(params, views={**VIEWS, **change})
    assert "other images or views" in sak("index", *options, code=2)
    assert "cannot grow" in sak("index", "--append", *options, code=2)
    for command in (["extract-teachers"], ["train-student", "distill"]):
        refused = " ".join(sak(*command, *options, code=2).split())
        assert "holds 3 view(s) per image, which are not" in refused
        assert "set store: to another path" in refused


def test_depth_scaling_asks_for_no_other_store(params: Path) -> None:
    options = ("--params", params)
    sak("index", *options)
    edit(params, views={**VIEWS, "depth": "scaled"})
    sak("index", "--append", *options)
    sak("extract-teachers", *options)


def test_a_misspelt_setting_is_named(params: Path) -> None:
    edit(params, views={"cuont": 3})
    assert "views.cuont: unknown key; did you mean 'count'?" in sak(
        "index", "--params", params, code=2
    )
