"""Images to an evaluated student through the commands a person types."""

import json
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import timm
import torch
import xarray
import yaml
from safetensors.torch import save_file

from pipeline.params import load_params
from pipeline.testing import sak, sak_json
from stages.data.dataset import open_dataset
from stages.data.images import decode_image
from stages.data.view import whole_image_box
from stages.extract import provenance
from stages.extract.teachers import load_teacher
from store.reader import FeatureStore


def edit(path: Path, **changes: Any) -> None:
    params = yaml.safe_load(path.read_text())
    params.update(changes)
    path.write_text(yaml.safe_dump(params))


def test_whole_path_and_what_it_leaves(tiny_params: Path) -> None:
    options = ("--params", tiny_params)
    params = load_params(tiny_params)
    assert sak_json("index", *options)["images"] == 9
    extracted = sak_json("extract-teachers", *options)["teachers"]
    assert [entry["images"] for entry in extracted] == [9, 9]
    again = sak_json("extract-teachers", *options)["teachers"]
    assert [entry["images"] for entry in again] == [0, 0]
    _assert_store_equals_live_teacher(params.store, tiny_params)

    assert sak_json("train-student", "distill", *options)["steps"] == 3
    sak_json("train-student", "multitask", *options)
    sak_json("train-student", "baseline", *options)
    for task in params.tasks:
        sak_json("train-student", "single-task", "--task", task, *options)
    result = sak_json("evaluate", *options)
    assert set(result["runs"]) == {"single-task", "multi-task, not distilled", "SAK student"}
    assert result["runs"]["single-task"]["delta_m"] == pytest.approx(0)
    assert result["tasks_counted"] == ["segmentation", "depth"]
    assert json.loads((params.report / "metrics.json").read_text()) == result
    assert "| SAK student |" in (params.report / "metrics.md").read_text()
    for name in ("multitask", "multitask-routers", "baseline"):
        assert (params.report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    store = sak_json("inspect", params.store)
    assert [teacher["name"] for teacher in store["teachers"]] == ["first", "second"]
    assert all(teacher["coverage"] == 1 for teacher in store["teachers"])
    assert sak_json("probe", *options)["images"] == {"train": 6, "val": 3}

    edit(tiny_params, distill={"steps": 3, "batch_size": 2, "learning_rate": 0.5})
    refused = sak("train-student", "distill", *options, code=2)
    assert "learning_rate" in refused
    restarted = sak_json("train-student", "distill", "--restart", *options)
    assert restarted["resumed_at"] == 0


def _assert_store_equals_live_teacher(path: Path, params_file: Path) -> None:
    params = load_params(params_file)
    dataset = open_dataset(params.data)
    store = FeatureStore(path)
    teacher = load_teacher(
        "first", params.teachers["first"], params.image_size, torch.device("cpu")
    )
    for level in store.teachers["first"].levels:
        component = f"first/{level.name}/native"
        plain = dask.array.from_zarr(str(path), component=component).compute()
        opened = xarray.open_zarr(path, group=f"first/{level.name}", consolidated=False)
        np.testing.assert_array_equal(plain, opened["native"].to_numpy())
        for image_id in dataset.split("val"):
            pixels = decode_image(dataset.path(image_id))
            box = whole_image_box(*pixels.shape[:2], params.image_size)
            live = teacher(teacher.preprocess(pixels, box)[None]).levels[level.name][0]
            stored = plain[store.row(image_id)]
            np.testing.assert_allclose(stored, live.numpy(), rtol=2e-3, atol=2e-3)


def test_store_of_another_image_set_is_refused(tiny_params: Path, tmp_path: Path) -> None:
    options = ("--params", tiny_params)
    sak("index", *options)
    data = yaml.safe_load(tiny_params.read_text())["data"]
    edit(tiny_params, data={**data, "root": str(tmp_path / "others"), "train": 7})
    refused = sak("index", *options, code=2)
    assert "features.zarr" in refused.replace("\n", "")


def test_training_refuses_other_pictures_under_the_same_ids(tiny_params: Path) -> None:
    options = ("--params", tiny_params)
    sak("index", *options)
    sak("extract-teachers", *options)
    params = load_params(tiny_params)
    image_id = open_dataset(params.data).split("train")[0]
    path = open_dataset(params.data).path(image_id)
    path.write_bytes(open_dataset(params.data).path("val_00000").read_bytes())
    edit(tiny_params, distill={"steps": 3, "batch_size": 6, "learning_rate": 0.001})
    refused = sak("train-student", "distill", *options, code=2)
    assert image_id in refused
    assert "sak index" in refused


def test_training_refuses_features_of_another_teacher(tiny_params: Path) -> None:
    options = ("--params", tiny_params)
    sak("index", *options)
    sak("extract-teachers", *options)
    teachers = yaml.safe_load(tiny_params.read_text())["teachers"]
    teachers["first"] = {"source": "timm:resnet18", "checkpoint": "random"}
    edit(tiny_params, teachers=teachers)
    refused = sak("train-student", "distill", *options, code=2)
    assert "resnet18" in refused
    assert "sak extract-teachers first --replace" in refused


def test_training_refuses_features_that_would_come_out_differently_now(
    tiny_params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "weights.safetensors"
    options = ("--params", tiny_params)
    teachers = yaml.safe_load(tiny_params.read_text())["teachers"]
    model = timm.create_model("vit_tiny_patch16_224", **teachers["first"]["model_args"])
    save_file(model.state_dict(), checkpoint)
    teachers["first"] |= {"checkpoint": str(checkpoint), "codec": "int8", "resolutions": [[2, 3]]}
    edit(tiny_params, teachers=teachers)
    sak("index", *options)
    sak("extract-teachers", *options)

    monkeypatch.setattr(provenance, "CODE_VERSION", 99)
    refused = sak("train-student", "distill", *options, code=2)
    assert "code_version: store has 2, asked for 99" in refused
    monkeypatch.undo()
    monkeypatch.setattr(provenance, "probe_digest", lambda *_: "another")
    refused = sak("train-student", "distill", *options, code=2)
    assert "probe_sha256" in refused
    monkeypatch.undo()
    save_file({name: value + 1 for name, value in model.state_dict().items()}, checkpoint)
    refused = sak("train-student", "distill", *options, code=2)
    assert "checkpoint_sha256" in refused
    assert "sak extract-teachers first --replace" in refused
    checkpoint.unlink()  # weights are not needed where the student is trained
    sak("train-student", "distill", *options)


@pytest.mark.parametrize(
    ("changes", "arguments", "expected"),
    [
        ({"teachers": {"x": {"source": "timm:vit_tny_patch16_224"}}}, ["extract-teachers"], "vit_tiny"),
        ({"teachers": {"x": {"source": "timm:resnet18", "checkpoint": "random", "levels": [9]}}},
         ["extract-teachers"], "9"),
        ({"tasks": ["segmentation", "edges"]}, ["index"], "edges"),
        ({}, ["extract-teachers", "third"], "first, second"),
        ({}, ["train-student", "distil"], "distill"),
        ({}, ["train-student", "single-task"], "--task"),
        ({}, ["train-student", "distill"], "first"),
        ({}, ["evaluate"], "multitask"),
        ({"teachers": {"x": {"source": "timm:vit_tiny_patch16_224", "checkpoint": "random",
                             "model_args": {"num_heads": 5}}}}, ["extract-teachers"], "num_heads"),
        ({"student": {"model": "vit_tiny_patch16_224", "model_args": {"num_heads": 5}}},
         ["train-student", "single-task", "--task", "depth"], "num_heads"),
        ({"runtime": {"device": "meta"}}, ["train-student", "distill"], "runtime.device"),
    ],
)  # fmt: skip
def test_mistakes_end_in_a_message(
    tiny_params: Path, changes: dict[str, Any], arguments: list[str], expected: str
) -> None:
    if arguments != ["index"]:
        sak("index", "--params", tiny_params)
    edit(tiny_params, **changes)
    output = sak(*arguments, "--params", tiny_params, code=2)
    assert expected in output


def test_inspect_of_what_is_no_store(tmp_path: Path) -> None:
    sak("inspect", tmp_path, code=2)


def test_advised_commands_name_the_parameter_file(tiny_params: Path) -> None:
    spaced = tiny_params.with_name("my params.yaml")
    tiny_params.rename(spaced)
    for arguments in (["--params", str(spaced)], [f"--params={spaced}"]):
        output = sak("extract-teachers", *arguments, code=2)
        assert f"`sak index --params '{spaced}'`" in " ".join(output.split())
    sak("index", "--params", spaced)
    sak("extract-teachers", "--params", spaced)
    teachers = yaml.safe_load(spaced.read_text())["teachers"]
    edit(spaced, teachers={name: {**one, "precision": "bf16"} for name, one in teachers.items()})
    output = sak("train-student", "distill", "--params", spaced, code=2)
    assert f"`sak extract-teachers first --replace --params '{spaced}'`" in " ".join(output.split())
