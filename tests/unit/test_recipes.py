"""Every recipe resolves in every size, plans, and trains two steps; small models, its own sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import yaml
from PIL import Image

from pipeline import planning
from pipeline.params import load_params
from pipeline.recipes import SIZES, STATED, Recipe, all_recipes, recipe
from pipeline.testing import sak, sak_json
from stages.train.testing import make_data
from tests.conftest import tiny_project

RECIPES = all_recipes()
STUB = {"embed_dim": 32, "depth": 4, "num_heads": 2}
STUBS: dict[str, dict[str, Any]] = {
    "dinov2": STUB,
    "clip": STUB,
    "sam": {**STUB, "global_attn_indexes": [3], "window_size": 14},
}


def every(entry: Recipe) -> list[Any]:
    return [pytest.param(entry, size, id=f"{entry.name}-{size}") for size in (None, *entry.sizes)]


@pytest.mark.parametrize(("entry", "size"), [case for entry in RECIPES for case in every(entry)])
def test_a_recipe_resolves(tmp_path: Path, entry: Recipe, size: str | None) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(entry.at(size))
    params = load_params(path)
    for teacher in params.teachers.values():
        name = teacher.source.removeprefix("timm:")
        assert timm.is_model(name.partition(".")[0])
        if size:
            assert name in timm.list_pretrained()
            assert {"B": "base", "L": "large"}[size[0]] in name
    if size:
        assert {"S": "small", "B": "base", "L": "large"}[size[1]] in params.student.model
        assert params.student.model in timm.list_pretrained()
        assert params.student.mean == (0.485, 0.456, 0.406)
        assert f"/{size}/" in params.store
        assert f"/{size}/" in str(params.runs)


def test_the_published_settings_are_those_of_the_recipes() -> None:
    first = yaml.safe_load(recipe("imagenet-distill").text)
    epoch = 1_281_167 // 128
    assert first["image_size"] == [384, 384]
    assert first["distill"] | {"workers": 0} == {
        "steps": 30 * epoch, "warmup_steps": 2 * epoch, "batch_size": 128, "learning_rate": 1e-3,
        "learning_rate_start": 1.25e-7, "learning_rate_min": 1e-5, "weight_decay": 0.01,
        "schedule": "cosine", "jitter": False, "targets": "online", "workers": 0,
    }  # fmt: skip
    second = yaml.safe_load(recipe("nyud").text)
    assert second["image_size"] == [448, 576]
    assert second["multitask"] | {"workers": 0} == {
        "steps": 40_000, "batch_size": 4, "learning_rate": 2e-5, "learning_rate_start": 0.0,
        "weight_decay": 1e-6, "schedule": "poly", "gradient_clip": 10.0, "alpha": 1.0,
        "jitter": False, "workers": 0,
    }  # fmt: skip


def test_the_listing_tells_what_each_header_states() -> None:
    told = {entry["name"]: entry for entry in sak_json("recipes")["recipes"]}
    assert {"scenes", "nyud", "imagenet-distill", "folder"} <= set(told)
    for entry in RECIPES:
        assert all(told[entry.name][key] for key in STATED)
        assert told[entry.name]["sizes"] in ([], list(SIZES))
    assert "imagenet-distill" in sak("recipes")


def test_show_writes_a_file_once(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    sak("recipes", "show", "nyud", "--size", "LB", "--output", path)
    assert load_params(path).teachers["sam"].source == "timm:samvit_large_patch16.sa1b"
    assert sak("recipes", "show", "nyud", "--size", "LB") == path.read_text()
    assert "exists" in sak("recipes", "show", "nyud", "--output", path, code=2)
    assert "did you mean 'nyud'" in sak("recipes", "show", "nyut", code=2)
    assert "BB, BS, LB, LL" in sak("recipes", "show", "nyud", "--size", "SB", code=2)
    assert "models of its own" in sak("recipes", "show", "nyud-mobilenet", "--size", "BB", code=2)


def make_images(root: Path) -> None:
    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(4):
        pixels = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")


def shrunk(entry: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe on tiny data with random models of four narrow blocks, all its sizes kept."""
    values: dict[str, Any] = yaml.safe_load(entry.text)
    for name, teacher in values["teachers"].items():
        teacher["checkpoint"] = "random"
        teacher["model_args"] = STUBS.get(name, teacher.get("model_args", {}))
    values["student"] |= {"pretrained": False, "model_args": STUB}
    for place in ("store", "runs", "report"):
        values[place] = str(folder / place)
    values["views"] = {**values.get("views", {}), "count": 1}
    if values["data"]["kind"] == "folder":
        make_images(folder / "data")
    elif values["data"]["kind"] == "nyud":
        make_data(folder / "data", images=4)
    elif values["data"]["kind"] == "scenes":
        values["data"] |= {"train": 2, "val": 1}
    values["data"]["root"] = str(folder / "data")
    values["extract"] = {"batch_size": 1, "equivariance_images": 0}
    for phase in ("distill", "multitask"):
        values[phase] |= {"steps": 2, "batch_size": 1, "workers": 0, "warmup_steps": 0}
    return values


@pytest.mark.parametrize("entry", RECIPES, ids=lambda entry: entry.name)
def test_a_recipe_plans_and_trains_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: Recipe
) -> None:
    monkeypatch.setattr(planning, "LADDER", ("float16",))
    monkeypatch.setattr(planning, "DISK_BYTES", 2**20)
    path = tmp_path / "params.yaml"
    values = shrunk(entry, tmp_path)
    path.write_text(yaml.safe_dump(values))
    options = ("--params", path)
    sak("index", *options)
    assert "error" not in sak("plan", "--measure-images", "2", *options)
    if values["distill"].get("targets") != "online":
        sak("extract-teachers", *options)
    phases = ["distill", "multitask"] if values["tasks"] else ["distill"]
    for phase in phases:
        trained = sak_json("train-student", phase, *options)
        assert trained["steps"] == 2
        assert trained["losses"]["loss"] > 0


def test_multitask_starts_from_another_run(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    project = tiny_project(tmp_path)
    path.write_text(yaml.safe_dump(project))
    options = ("--params", path)
    sak("index", *options)
    sak("extract-teachers", *options)
    sak("train-student", "distill", *options)
    path.write_text(yaml.safe_dump({**project, "runs": str(tmp_path / "other")}))
    message = sak("train-student", "multitask", *options, code=2)
    assert "finish its run" in message
    start = ("--initialise-from", tmp_path / "runs" / "distill")
    trained = sak_json("train-student", "multitask", *start, *options)
    assert trained["random_parts"] == ["routers", "heads"]
    assert "belongs to multitask" in sak("train-student", "distill", *start, *options, code=2)
