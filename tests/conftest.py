"""Fixtures that several parts share: a project small enough to run end to end in seconds."""

from pathlib import Path
from typing import Any

import pytest
import yaml

TINY_VIT = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


def tiny_project(folder: Path) -> dict[str, Any]:
    """Parameters of a whole run inside `folder`: nine scenes, two random teachers, two tasks."""
    teacher = {
        "source": "timm:vit_tiny_patch16_224", "model_args": TINY_VIT, "checkpoint": "random"
    }  # fmt: skip
    phase = {"steps": 3, "batch_size": 2, "learning_rate": 0.001, "log_every": 1}
    return {
        "image_size": [32, 48],
        "data": {"kind": "scenes", "root": str(folder / "scenes"), "train": 6, "val": 3, "seed": 1},
        "tasks": ["segmentation", "depth"],
        "store": str(folder / "features.zarr"),
        "runs": str(folder / "runs"),
        "report": str(folder / "report"),
        "teachers": {"first": teacher, "second": {**teacher, "levels": [0, 1, 2, 3]}},
        "extract": {"batch_size": 4},
        "student": {"model": "vit_tiny_patch16_224", "model_args": TINY_VIT},
        "runtime": {"device": "cpu", "precision": "fp32", "seed": 0},
        "distill": phase,
        "multitask": {**phase, "schedule": "poly", "gradient_clip": 10.0},
    }


@pytest.fixture
def tiny_params(tmp_path: Path) -> Path:
    """Path of a written parameter file for `tiny_project`."""
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(tiny_project(tmp_path)))
    return path
