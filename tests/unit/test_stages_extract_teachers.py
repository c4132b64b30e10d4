import shutil

import pytest
import torch

from stages.extract.config import TeacherConfig
from stages.extract.errors import TeacherError
from stages.extract.teachers import choose_device, load_teacher

VIEW = (32, 48)
CONFIG = TeacherConfig(source="timm:test_vit", checkpoint="random", levels=2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_comes_close_and_is_recorded(precision: str) -> None:
    exact = load_teacher("vit", CONFIG, VIEW, torch.device("cpu"))
    config = CONFIG.model_copy(update={"precision": precision})
    rough = load_teacher("vit", config, VIEW, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, *VIEW, 3), dtype=torch.uint8, generator=generator)
    for name, grid in rough(images).levels.items():
        assert grid.dtype == torch.float32
        assert not torch.equal(grid, exact(images).levels[name])
        torch.testing.assert_close(grid, exact(images).levels[name], atol=0.1, rtol=0.05)
    assert rough.spec.fingerprint() != exact.spec.fingerprint()


def pixels(count: int, size: tuple[int, int] = VIEW) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def test_the_exact_sibling_is_the_same_network_in_float32() -> None:
    plain = load_teacher("vit", CONFIG, VIEW, torch.device("cpu"))
    config = CONFIG.model_copy(update={"precision": "bf16"})
    exact = load_teacher("vit", config, VIEW, torch.device("cpu")).exact()
    for name, grid in exact(pixels(2)).levels.items():
        assert torch.equal(grid, plain(pixels(2)).levels[name])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("timm:test_convnext", torch.channels_last),
        ("timm:mobilenetv2_035", torch.channels_last),
        ("timm:test_vit", torch.contiguous_format),
    ],
)
def test_convolutional_networks_run_channels_last_and_say_so(
    source: str, expected: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TeacherConfig(source=source, checkpoint="random", levels=2)
    chosen = load_teacher("net", config, (64, 96), torch.device("cpu"))
    assert chosen.memory_format == expected
    said = "channels_last" if expected == torch.channels_last else None
    assert chosen.spec.provenance.get("memory_format") == said
    monkeypatch.setattr(
        "stages.extract.teachers.best_memory_format", lambda module: torch.contiguous_format
    )
    usual = load_teacher("net", config, (64, 96), torch.device("cpu"))
    images = pixels(3, (64, 96))
    for name, grid in usual(images).levels.items():
        other = chosen(images).levels[name]
        assert float((grid - other).norm() / grid.norm()) < 1e-5


@pytest.mark.slow  # the compiler takes a minute
def test_a_compiled_network_agrees_with_the_plain_one() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    plain = load_teacher("vit", CONFIG, VIEW, torch.device("cpu"))
    config = CONFIG.model_copy(update={"compile": True})
    compiled = load_teacher("vit", config, VIEW, torch.device("cpu"))
    for count in (1, 3):
        for name, grid in compiled(pixels(count)).levels.items():
            torch.testing.assert_close(
                grid, plain(pixels(count)).levels[name], atol=1e-4, rtol=1e-4
            )
    assert compiled.spec.provenance["compiled_by"].startswith("torch ")
    assert "compile" not in plain.spec.provenance["config"]


def test_an_input_size_that_a_network_cannot_take_is_refused() -> None:
    config = TeacherConfig(source="timm:mvitv2_tiny", checkpoint="random")
    with pytest.raises(TeacherError, match="32 x 64 pixels: AssertionError; try another"):
        load_teacher("mvit", config, (32, 64), torch.device("cpu"))


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(TeacherError, match="no cuda:99 on this machine"):
        choose_device("cuda:99")
