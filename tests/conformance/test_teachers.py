"""What every teacher must do, run on one small random member of each family; where: test_markers.

A new family joins by a class with a `config`; sizes are kept tiny so that all of it takes seconds.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from stages.data.view import whole_image_box
from stages.extract.config import TeacherConfig
from stages.extract.preprocess import probe_box, probe_image
from stages.extract.teachers import Features, Teacher, load_teacher
from store.spec import canonical_json

CPU = torch.device("cpu")
VIEWS = ((96, 96), (96, 128))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks are slower on many threads, and much slower beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_config(source: str, **fields: Any) -> TeacherConfig:
    return TeacherConfig(source=source, checkpoint="random", **fields)


def images(count: int, height: int, width: int) -> list[np.ndarray]:
    """Smooth random images, so that resizing changes little."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 6, 8, 3), np.uint8)
    return [np.kron(image, np.ones((height // 6, width // 8, 1), np.uint8)) for image in coarse]


def inputs(teacher: Teacher, pictures: list[np.ndarray], view: tuple[int, int]) -> torch.Tensor:
    boxes = [whole_image_box(*picture.shape[:2], view) for picture in pictures]
    return torch.stack(
        [teacher.preprocess(picture, box) for picture, box in zip(pictures, boxes, strict=True)]
    )


def answer(teacher: Teacher, pictures: list[np.ndarray], view: tuple[int, int]) -> Features:
    return teacher(inputs(teacher, pictures, view))


class TeacherTests:
    """Inherit, and set `config`; everything else follows from the teacher's own spec."""

    config: TeacherConfig
    kind = "block"
    """What the family's levels are called."""
    pooled = False
    """Whether the family has a class token."""

    @pytest.fixture(scope="class", params=VIEWS, ids=["square", "wide"])
    @classmethod
    def view(cls, request: pytest.FixtureRequest) -> tuple[int, int]:
        size: tuple[int, int] = request.param
        return size

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls, view: tuple[int, int]) -> Teacher:
        return load_teacher("member", cls.config, view, CPU)

    def test_answers_have_the_shapes_that_the_spec_promises(
        self, teacher: Teacher, view: tuple[int, int]
    ) -> None:
        features = answer(teacher, images(2, 96, 128), view)
        promised = {level.name: (2, *level.grid, level.channels) for level in teacher.spec.levels}
        assert {name: tuple(grid.shape) for name, grid in features.levels.items()} == promised
        assert all(grid.dtype == torch.float32 for grid in features.levels.values())
        assert all(grid.isfinite().all() for grid in features.levels.values())
        if features.pooled is None:
            assert teacher.spec.global_channels is None
        else:
            assert features.pooled.shape == (2, teacher.spec.global_channels)

    def test_levels_are_named_after_blocks_or_stages(self, teacher: Teacher) -> None:
        assert all(level.name.startswith(f"{self.kind}_") for level in teacher.spec.levels)
        assert (teacher.spec.global_channels is not None) == self.pooled

    def test_grids_have_the_aspect_ratio_of_the_view(
        self, teacher: Teacher, view: tuple[int, int]
    ) -> None:
        for level in teacher.spec.levels:
            rows, columns = level.grid
            assert abs(rows / columns - view[0] / view[1]) <= 0.5 / columns + 0.5 / rows

    def test_the_same_images_give_the_same_bits(
        self, teacher: Teacher, view: tuple[int, int]
    ) -> None:
        first, again = (answer(teacher, images(2, 96, 128), view) for _ in range(2))
        for name, grid in first.levels.items():
            assert torch.equal(grid, again.levels[name])

    def test_an_answer_does_not_depend_on_the_rest_of_the_batch(
        self, teacher: Teacher, view: tuple[int, int]
    ) -> None:
        pictures = images(3, 96, 128)
        together = answer(teacher, pictures, view)
        alone = answer(teacher, pictures[1:2], view)
        for name, grid in together.levels.items():
            scale = float(grid.abs().max())
            torch.testing.assert_close(grid[1:2], alone.levels[name], atol=1e-5 * scale, rtol=1e-4)

    def test_another_load_is_the_same_teacher(
        self, teacher: Teacher, view: tuple[int, int]
    ) -> None:
        again = load_teacher("member", self.config, view, CPU)
        assert again.spec.fingerprint() == teacher.spec.fingerprint()
        box = probe_box(view)
        assert torch.equal(
            again.preprocess(probe_image(), box), teacher.preprocess(probe_image(), box)
        )

    def test_provenance_says_what_was_run(self, teacher: Teacher) -> None:
        provenance = json.loads(canonical_json(dict(teacher.spec.provenance)))
        assert provenance["weights"] == "random weights"
        assert len(provenance["weights_sha256"]) == len(provenance["probe_sha256"]) == 64
        assert provenance["source"] == self.config.source
        assert provenance["preprocessing"].keys() >= {"mean", "std", "interpolation", "input_size"}


class TestViT16(TeacherTests):
    config = random_config(
        "timm:vit_tiny_patch16_224", model_args={"depth": 4, "embed_dim": 48, "num_heads": 2}
    )
    pooled = True


class TestViT14(TeacherTests):
    config = random_config(
        "timm:vit_small_patch14_dinov2",
        model_args={"depth": 4, "embed_dim": 48, "num_heads": 2},
    )
    pooled = True


class TestRotaryViTWithRegisters(TeacherTests):
    config = random_config(
        "timm:vit_small_patch16_dinov3",
        model_args={"depth": 4, "embed_dim": 48, "num_heads": 2},
    )
    pooled = True


class TestViTWithoutClassToken(TeacherTests):
    config = random_config(
        "timm:vit_base_patch16_siglip_224",
        model_args={"depth": 4, "embed_dim": 48, "num_heads": 2},
    )


class TestSam(TeacherTests):
    """Letterboxed, as SAM is: 256 stands for 1024."""

    config = random_config(
        "timm:samvit_base_patch16",
        input_size="native",
        levels=2,
        model_args={
            "img_size": 256,
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 2,
            "global_attn_indexes": [1],
            "window_size": 4,
        },
    )


class TestConvNeXt(TeacherTests):
    config = random_config(
        "timm:convnext_atto", model_args={"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}
    )
    kind = "stage"


class TestSwin(TeacherTests):
    config = random_config(
        "timm:swin_tiny_patch4_window7_224",
        model_args={"depths": [2, 2, 2, 2], "embed_dim": 16, "num_heads": [1, 1, 2, 2]},
    )
    kind = "stage"


class TestHiera(TeacherTests):
    config = random_config(
        "timm:hiera_tiny_224",
        model_args={"stages": [1, 1, 1, 1], "embed_dim": 16, "num_heads": 1},
    )
    kind = "stage"


class TestMobileNet(TeacherTests):
    config = random_config("timm:mobilenetv2_035", model_args={"output_stride": 16})
    kind = "stage"


class TestOpenClip(TeacherTests):
    config = random_config("open_clip:sak-tiny-clip")
    pooled = True

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def tiny_model(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        vision = {"image_size": 64, "layers": 4, "width": 48, "head_width": 24, "patch_size": 16}
        text = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
        add_open_clip_model(
            tmp_path_factory.mktemp("open_clip") / "sak-tiny-clip.json",
            {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
        )


class TestOpenClipOverTimm(TeacherTests):
    config = random_config("open_clip:sak-tiny-timm-clip")
    pooled = True

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def tiny_model(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        vision = {"image_size": 64, "timm_model_name": "test_vit", "timm_pool": "token"}
        text = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
        add_open_clip_model(
            tmp_path_factory.mktemp("open_clip") / "sak-tiny-timm-clip.json",
            {"embed_dim": 16, "vision_cfg": vision | {"timm_proj": "linear"}, "text_cfg": text},
        )


def add_open_clip_model(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)


def test_sam_at_its_own_size_keeps_48_rows_of_a_3_to_4_image() -> None:
    config = random_config(
        "timm:samvit_base_patch16",
        input_size="native",
        levels=1,
        model_args={"depth": 1, "embed_dim": 8, "num_heads": 1, "global_attn_indexes": []},
    )
    teacher = load_teacher("sam", config, (96, 128), CPU)
    assert teacher.spec.levels[0].grid == (48, 64)
    assert teacher.spec.provenance["preprocessing"]["input_size"] == [1024, 1024]
