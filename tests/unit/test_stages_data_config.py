"""The data section of `params.yaml`, and the tables of tasks."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from stages.data.config import DataConfig, ScenesData
from stages.data.tasks import NYUD_TASKS, PASCAL_TASKS, SCENES_TASKS


def test_task_tables_hold_the_published_figures() -> None:
    weights = {
        name: {task.name: (task.channels, task.loss_weight) for task in tasks}
        for name, tasks in (("nyud", NYUD_TASKS), ("pascal", PASCAL_TASKS))
    }
    assert weights["nyud"] == {
        "segmentation": (40, 1),
        "depth": (1, 1),
        "normals": (3, 10),
        "boundary": (1, 50),
    }
    assert weights["pascal"] == {
        "segmentation": (21, 1),
        "parts": (7, 2),
        "saliency": (2, 5),
        "normals": (3, 10),
        "boundary": (1, 50),
    }
    lower = {task.metric for task in SCENES_TASKS if task.lower_is_better}
    assert lower == {"RMSE", "mErr", "loss"}


def test_configuration_is_strict(tmp_path: Path) -> None:
    adapter: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)
    scenes = {"kind": "scenes", "root": str(tmp_path), "train": 4, "val": 2, "max_bad": 0}
    assert adapter.validate_python(scenes) == ScenesData(
        kind="scenes", root=tmp_path, train=4, val=2, seed=0, max_bad=0
    )
    for change in ({"train": "4"}, {"max_bad": 1.5}, {"trian": 4}, {"kind": "imagenet"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(scenes | change)
