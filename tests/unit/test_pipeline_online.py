"""`targets: online` and `reuse` as a person sets them: from the parameter file to a student."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pipeline.testing import sak, sak_json
from tests.conftest import tiny_project


def make_project(folder: Path, **changes: object) -> Path:
    (folder / "images").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    values = tiny_project(folder)
    values["data"] = {"kind": "folder", "root": str(folder / "images")}
    values["tasks"] = []
    values["distill"] |= changes
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_student_is_distilled_without_any_stored_feature(tmp_path: Path) -> None:
    params = make_project(tmp_path, targets="online")
    sak("index", "--params", params)
    summary = sak_json("train-student", "distill", "--params", params)
    assert summary["steps"] == 3
    assert summary["losses"]["distill_first"] > 0
    assert (tmp_path / "runs" / "distill" / "student.safetensors").is_file()
    assert not (tmp_path / "features.zarr" / "first").exists()


def test_reuse_online_is_refused_at_the_parameter_file(tmp_path: Path) -> None:
    params = make_project(tmp_path, targets="online", reuse={"flip": 0.9})
    told = sak("index", "--params", params, code=2)
    assert "targets: online has none" in " ".join(told.split())
