"""The embedded default's own teachers: there, small, and loaded by the ordinary teacher path."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.params import load_params
from stages.data.view import whole_image_box
from stages.extract.teachers import load_teacher

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "stages" / "extract" / "weights"
MOST_BYTES = 12 * 10**6
PARAMS = load_params(ROOT / "params.yaml")


def test_weights_are_small_and_have_a_card() -> None:
    files = sorted(WEIGHTS.glob("*.safetensors"))
    assert {file.stem for file in files} == set(PARAMS.teachers)
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES
    card = (WEIGHTS / "CARD.md").read_text()
    assert all(file.stem in card for file in files)


@pytest.mark.parametrize("name", PARAMS.teachers)
def test_teacher_loads_and_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    teacher = load_teacher(name, PARAMS.teachers[name], PARAMS.image_size, torch.device("cpu"))
    assert len(teacher.spec.levels) == 4
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    image = teacher.preprocess(pixels, whole_image_box(96, 128, PARAMS.image_size))
    features = teacher(torch.stack([image, image.flip(1)]))
    for level in teacher.spec.levels:
        answer = features.levels[level.name]
        assert answer.shape == (2, *level.grid, level.channels)
        assert torch.isfinite(answer).all()
        assert not torch.equal(answer[0], answer[1])
