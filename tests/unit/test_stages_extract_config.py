from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.extract.config import ExtractConfig, TeacherConfig


def test_lists_as_yaml_gives_them_are_accepted() -> None:
    config = TeacherConfig(
        source="timm:mobilenetv2_100",
        checkpoint="weights/a.safetensors",  # type: ignore[arg-type]
        levels=[1, 3],  # type: ignore[arg-type]
        input_size=[448, 576],  # type: ignore[arg-type]
        mean=[0.5, 0.5, 1],  # type: ignore[arg-type]
    )
    assert config.checkpoint == Path("weights/a.safetensors")
    assert config.levels == (1, 3)
    assert config.input_size == (448, 576)
    assert config.mean == (0.5, 0.5, 1.0)


def test_random_weights_are_no_file() -> None:
    config = TeacherConfig(source="open_clip:ViT-B-32", checkpoint="random")
    assert config.checkpoint == "random"
    assert not isinstance(config.checkpoint, Path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", "dinov2"),
        ("source", "torchvision:resnet18"),
        ("source", "timm:"),
        ("levels", 0),
        ("levels", []),
        ("levels", [1.5]),
        ("levels", True),
        ("input_size", "auto"),
        ("input_size", [224]),
        ("input_size", [0, 224]),
        ("mean", [0.5, 0.5]),
        ("interpolation", "nearest"),
        ("precision", "fp8"),
        ("colour", "red"),
    ],
)
def test_wrong_settings_are_refused_by_name(field: str, value: Any) -> None:
    fields = {"source": "timm:resnet18"} | {field: value}
    with pytest.raises(ValidationError) as caught:
        TeacherConfig(**fields)
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("shard_megabytes", 0.5), ("device", "gpu"), ("covariance", "yes")],
)
def test_wrong_extraction_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        ExtractConfig(**{field: value})
    assert caught.value.errors()[0]["loc"] == (field,)
