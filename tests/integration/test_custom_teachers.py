"""A user's own teacher, from a package of its own: checked, extracted, and kept apart by its code."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from stages.data.view import whole_image_box
from stages.extract.check_teacher import Check, check_teacher
from stages.extract.config import TeacherConfig
from stages.extract.errors import TeacherError, WrongCheckpointError
from stages.extract.provenance import foreseen_provenance
from stages.extract.teacher_checks import CHECKS
from stages.extract.teachers import load_teacher
from stages.progress import NoProgress
from store.reader import FeatureStore

PACKAGE = Path(__file__).parents[1] / "packages" / "colours"
CPU = torch.device("cpu")
VIEW = (64, 96)
CUSTOM = TeacherConfig(source="custom:mean-colours", levels=2)


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package, installed by pip into a folder of its own that is on the path."""
    work = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE, work / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    options = ["--no-build-isolation", "--target", str(work / "target"), str(work / "source")]
    subprocess.run([*pip, *options], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(work / "target")
        yield work / "target"
    for name in [name for name in sys.modules if name.partition(".")[0] == "colours"]:
        del sys.modules[name]


def sak(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    loaded: dict[str, Any] = (
        json.loads(result.stdout) if code in (0, 3) else {"error": result.output}
    )
    return loaded


def test_an_installed_class_is_extracted_and_known_by_its_package(tmp_path: Path) -> None:
    params = project(tmp_path)
    sak("index", "--params", params)
    (extracted,) = sak("extract-teachers", "--params", params)["teachers"]
    assert extracted["images"] == 4
    store = FeatureStore(tmp_path / "features.zarr")
    provenance = store.teachers["own"].provenance
    assert provenance["library"] == f"colours {version('colours')}"
    assert provenance["model"] == "colours:MeanColours"
    assert provenance["licence"] == "mit"
    assert provenance["weights"] == "those of its class"
    assert len(provenance["weights_sha256"]) == len(provenance["custom_code"]) == 64
    teacher = load_teacher("own", CUSTOM, VIEW, CPU)
    pixels = np.array(Image.open(tmp_path / "images" / "2.png"))
    expected = teacher(teacher.preprocess(pixels, whole_image_box(80, 120, VIEW))[None])
    for level, grid in (("stage_0", (8, 12)), ("stage_1", (4, 6))):
        stored = store.read("own", level, [2])
        assert stored.shape == (1, *grid, 5)
        np.testing.assert_allclose(stored, expected.levels[level], rtol=1e-3, atol=1e-3)
    assert store.read("own", "global", [2]).shape == (1, 5)


def test_features_of_other_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import colours

    params = project(tmp_path)
    sak("index", "--params", params)
    sak("extract-teachers", "--params", params)
    before = foreseen_provenance(CUSTOM, VIEW)
    monkeypatch.setattr(colours.MeanColours, "version", "2", raising=False)
    after = foreseen_provenance(CUSTOM, VIEW)
    assert (len(before["custom_code"]), after["custom_code"]) == (64, "2")
    refused = sak("extract-teachers", "--params", params, code=2)["error"]
    assert "custom_code" in refused


def project(folder: Path) -> Path:
    images = folder / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        pixels = generator.integers(0, 256, (80, 120, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    phase = {"steps": 1, "batch_size": 1, "learning_rate": 0.001}
    params = {
        "image_size": VIEW,
        "data": {"kind": "folder", "root": str(images)},
        "tasks": [],
        "store": str(folder / "features.zarr"),
        "runs": str(folder / "runs"),
        "report": str(folder / "report"),
        "teachers": {"own": {"source": CUSTOM.source, "levels": 2}},
        "extract": {"batch_size": 3, "device": "cpu"},
        "student": {"model": "vit_tiny_patch16_224"},
        "runtime": {"device": "cpu", "precision": "fp32", "seed": 0},
        "distill": phase,
        "multitask": phase,
    }
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(params))))
    return path


def test_the_command_checks_an_installed_class_in_this_process_and_another() -> None:
    arguments = ("teachers", "check", "mean-colours", "--size", "64x96", "--size", "80x80")
    result = sak(*arguments, "--device", "cpu", "--params", "none")
    assert result["passed"]
    assert [one["name"] for one in result["checks"]] == ["builds", *CHECKS, "another process"]
    assert result["source"] == "custom:mean-colours"


def test_installed_teachers_are_listed() -> None:
    listed = sak("teachers", "--params", "none")["teachers"]
    assert "custom:mean-colours" in [one["source"] for one in listed]


def test_what_is_wrong_is_a_line_of_its_own_and_exit_code_3() -> None:
    arguments = ("teachers", "check", "colours:Cropping", "--size", "64x96", "--device", "cpu")
    result = sak(*arguments, "--params", "none", code=3)
    assert not result["passed"]
    (built,) = result["checks"]
    assert "stage_0 answers with 6 x 10 cells, one per 8 pixels" in built["detail"]


@pytest.mark.parametrize(
    ("faulty", "check", "what"),
    [
        ("Mirrored", "markers", "stage_1 shows 4 of 4 markers"),
        ("Forgetful", "deterministic", "dropout"),
        ("Sociable", "batch", "statistics over the batch"),
        ("Unfinished", "levels", "holds NaN"),
    ],
)
def test_each_fault_fails_its_own_check(
    faulty: str, check: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.extract.check_teacher._build_elsewhere", not_tried)
    monkeypatch.setattr("stages.extract.teacher_checks._SECONDS", 0)
    config = TeacherConfig(source=f"custom:colours:{faulty}", levels=2)
    checks = check_teacher(config, [VIEW], CPU, NoProgress())
    failed = {one.name: one.detail for one in checks if not one.passed}
    assert what in failed.pop(check)
    assert failed.keys() <= {
        "deterministic",
        "batch",
        "markers",
    }  # dropout and NaN show there as well


def not_tried(*_: object) -> Check:
    return Check(name="another process", passed=True, detail="not tried")


def test_a_teacher_that_is_another_one_elsewhere_is_found_out() -> None:
    config = TeacherConfig(source="custom:colours:Drifting", levels=2)
    (last,) = check_teacher(config, [VIEW], CPU, NoProgress())[-1:]
    assert not last.passed
    assert "provenance.weights_sha256" in last.detail


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("colours:Silent", r"a map B C h w for each of the class's 2 reductions, got shapes"),
        ("colours:Broken", r"forward of images .* raised KeyError: 'no such layer' \(.*, line \d+"),
        ("colours:Nameless", r"Nameless lacks the class attributes native_size, mean, std"),
        ("colours:Missing", r"has no attribute 'Missing'"),
        ("colours:torch", r"names <module 'torch'.*expected a class"),
        ("colouring:Any", r"cannot be imported: No module named 'colouring'.*pip install -e"),
        ("mean-colour", r"no teacher|did you mean 'mean-colours'"),
    ],
)
def test_mistakes_are_explained(source: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load_teacher("own", TeacherConfig(source=f"custom:{source}", levels=2), VIEW, CPU)


def test_arguments_and_checkpoints_reach_the_class(tmp_path: Path) -> None:
    config = CUSTOM.model_copy(update={"model_args": {"channels": 7}})
    assert load_teacher("own", config, VIEW, CPU).spec.levels[0].channels == 7
    wrong = CUSTOM.model_copy(update={"model_args": {"chanels": 7}})
    with pytest.raises(TeacherError, match=r"making MeanColours .* raised TypeError: .*'chanels'"):
        load_teacher("own", wrong, VIEW, CPU)
    file = tmp_path / "own.pt"
    torch.save({"mix.weight": torch.ones(5, 3), "mix.bias": torch.zeros(5)}, file)
    teacher = load_teacher("own", CUSTOM.model_copy(update={"checkpoint": file}), VIEW, CPU)
    assert teacher.spec.provenance["weights"] == "own.pt"
    white = np.full((64, 96, 3), 255, np.uint8)
    features = teacher(teacher.preprocess(white, whole_image_box(64, 96, VIEW))[None])
    assert features.levels["stage_0"].unique().tolist() == [
        6.0
    ]  # three channels of (1 - 0.5) / 0.25
    torch.save({"mix.weight": torch.ones(5, 3)}, file)
    with pytest.raises(WrongCheckpointError, match=r"1 missing: mix\.bias"):
        load_teacher("own", CUSTOM.model_copy(update={"checkpoint": file}), VIEW, CPU)
