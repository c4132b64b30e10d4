"""A bright marker is found at its cell in every family of teachers, whatever shape the image has.

Random weights: what is tested is where things lie, which weights do not change.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stages.extract.config import TeacherConfig
from stages.extract.errors import TeacherError
from stages.extract.markers import find_markers
from stages.extract.teachers import Features, Teacher, load_teacher

CPU = torch.device("cpu")
VIEWS = {"square": (224, 224), "wide": (192, 320), "tall": (288, 160)}
SMALL_VIT = {"depth": 4, "embed_dim": 96, "num_heads": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_config(source: str, **fields: Any) -> TeacherConfig:
    return TeacherConfig(source=source, checkpoint="random", **fields)


EXACT = {
    "ViT/14": random_config("timm:vit_small_patch14_dinov2", model_args=SMALL_VIT),
    "ViT/16": random_config("timm:vit_small_patch16_224", model_args=SMALL_VIT),
    "DINOv3": random_config("timm:vit_small_patch16_dinov3", model_args=SMALL_VIT),
    "CLIP": random_config("open_clip:ViT-B-32", levels=(0, 1)),
    "SigLIP": random_config("timm:vit_base_patch16_siglip_224", model_args=SMALL_VIT),
    "ConvNeXt": random_config("timm:convnext_atto"),
    "Swin": random_config(
        "timm:swin_tiny_patch4_window7_224",
        model_args={"depths": [2, 2, 2, 2], "embed_dim": 24, "num_heads": [1, 1, 2, 2]},
    ),
    "Swin v2": random_config(
        "timm:swinv2_tiny_window8_256",
        model_args={"depths": [2, 2, 2, 2], "embed_dim": 24, "num_heads": [1, 1, 2, 2]},
    ),
    "Hiera": random_config(
        "timm:hiera_tiny_224", model_args={"stages": [1, 1, 1, 1], "embed_dim": 24, "num_heads": 1}
    ),
}
"""Families whose cells are patches, or nearly: the marker's own cell answers most."""

STRIDED = {
    "ResNet": random_config("timm:resnet18"),
    "MobileNet v2": random_config("timm:mobilenetv2_035", levels=(1, 2)),  # deeper: noise
    "MobileNet v3": random_config("timm:mobilenetv3_small_050"),
}
"""Convolutions of odd width and stride 2 look half a cell up and left of the middle of a cell, so
that a marker answers half a cell down and right: up to the next cell, and no further."""

SAM = random_config(
    "timm:samvit_base_patch16",
    input_size="native",
    levels=2,
    model_args={"depth": 2, "embed_dim": 24, "num_heads": 2, "global_attn_indexes": [1]},
)
"""At its own 1024 pixels, padded to a square."""


def load(config: TeacherConfig, view: tuple[int, int]) -> Teacher:
    return load_teacher("member", config, view, CPU)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
def test_patches_answer_at_the_marker(config: TeacherConfig, view: tuple[int, int]) -> None:
    teacher = load(config, view)
    for flipped in (False, True):
        for found in find_markers(teacher, view, flipped=flipped):
            assert found.distance == 0, found
            assert max(map(abs, found.offset)) < 0.3, found


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("config", STRIDED.values(), ids=STRIDED)
def test_strided_convolutions_answer_within_a_cell(
    config: TeacherConfig, view: tuple[int, int]
) -> None:
    teacher = load(config, view)
    for flipped in (False, True):
        for found in find_markers(teacher, view, flipped=flipped):
            assert found.distance <= 1, found
            assert all(-0.3 < side < 0.8 for side in found.offset), found


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_letterboxed_sam_answers_at_the_marker(view: tuple[int, int]) -> None:
    teacher = load(SAM, view)
    sides = sorted(teacher.spec.levels[0].grid)
    assert sides == [round(64 * min(view) / max(view)), 64]  # the padding is cut off
    for found in find_markers(teacher, view, flipped=view == VIEWS["tall"]):
        assert found.distance == 0, found
        assert max(map(abs, found.offset)) < 0.1, found


class Misplaced:
    """A teacher that moves its cells."""

    def __init__(self, teacher: Teacher, move: Callable[[Tensor], Tensor]) -> None:
        self._teacher = teacher
        self._move = move
        self.spec = teacher.spec
        self.preprocess = teacher.preprocess

    def __call__(self, images: Tensor) -> Features:
        features = self._teacher(images)
        levels = {name: self._move(grid) for name, grid in features.levels.items()}
        return dataclasses.replace(features, levels=levels)


def stretched(grid: Tensor) -> Tensor:
    """What is left of a letterboxed grid that is stretched over the image, padding and all."""
    rows, columns = grid.shape[1:3]
    padded = functional.pad(grid.permute(0, 3, 1, 2), (0, 0, 0, columns - rows))
    return functional.interpolate(padded, (rows, columns)).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    "move",
    [lambda grid: grid.flip(2), lambda grid: grid.flip(1), lambda grid: grid.roll(2, 1), stretched],
    ids=["mirrored", "upside down", "two rows down", "stretched"],
)
def test_cells_in_the_wrong_place_are_noticed(move: Callable[[Tensor], Tensor]) -> None:
    view = VIEWS["wide"]
    teacher = load(EXACT["ViT/16"], view)
    for found in find_markers(Misplaced(teacher, move), view):
        assert found.distance > 1, found


def test_a_network_that_drops_the_border_of_its_grid_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"stage_4 answers with 4 x 8 cells, .* 6 x 10"):
        load(random_config("timm:inception_v3", levels=1), VIEWS["wide"])


@pytest.mark.parametrize(
    "source", ["timm:convit_tiny", "timm:efficientformer_l1", "timm:mvitv2_tiny"]
)
def test_a_network_of_one_size_only_refuses_others_and_names_them(source: str) -> None:
    with pytest.raises(TeacherError, match=r"192 x 320 pixels: .*; try another `input_size:`"):
        load(random_config(source, levels=1), VIEWS["wide"])
