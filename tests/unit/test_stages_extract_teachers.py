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


def test_an_input_size_that_a_network_cannot_take_is_refused() -> None:
    config = TeacherConfig(source="timm:mvitv2_tiny", checkpoint="random")
    with pytest.raises(TeacherError, match="32 x 64 pixels: AssertionError; try another"):
        load_teacher("mvit", config, (32, 64), torch.device("cpu"))


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(TeacherError, match="no cuda:99 on this machine"):
        choose_device("cuda:99")
