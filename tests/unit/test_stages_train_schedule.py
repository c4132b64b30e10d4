"""Learning rates, jitter and the settings, all pure functions."""

import math

import pytest
import torch
from pydantic import ValidationError

from stages.train.config import PhaseConfig, RuntimeConfig, StudentConfig
from stages.train.device import DeviceError, pick_device
from stages.train.jitter import image_generator, jitter
from stages.train.schedule import learning_rate


def phase(**settings: object) -> PhaseConfig:
    return PhaseConfig.model_validate({"steps": 100, "learning_rate": 1e-3} | settings)


def test_cosine_warms_up_and_ends_at_its_minimum() -> None:
    settings = phase(warmup_steps=20, learning_rate_min=1e-5)
    assert learning_rate(0, settings) == pytest.approx(1.25e-7)
    assert learning_rate(10, settings) == pytest.approx((1.25e-7 + 1e-3) / 2)
    assert learning_rate(20, settings) == pytest.approx(1e-3)
    assert learning_rate(60, settings) == pytest.approx((1e-3 + 1e-5) / 2)
    end = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 79 / 80))
    assert learning_rate(99, settings) == pytest.approx(end)


def test_polynomial_decays_with_power_nine_tenths() -> None:
    settings = phase(schedule="poly")
    assert learning_rate(0, settings) == pytest.approx(1e-3)
    assert learning_rate(50, settings) == pytest.approx(1e-3 * 0.5**0.9)
    assert learning_rate(99, settings) == pytest.approx(1e-3 * 0.01**0.9)


def test_jitter_depends_on_seed_epoch_and_image_only() -> None:
    image = torch.rand(3, 8, 12)
    original = image.clone()
    versions = [
        jitter(image, image_generator(seed, epoch, name))
        for seed, epoch, name in [(0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (0, 0, "b"), (0, 0, "a")]
    ]
    assert versions[4].equal(versions[0])
    assert len({version.sum().item() for version in versions[:4]}) > 1
    for epoch in range(20):
        version = jitter(image, image_generator(0, epoch, "a"))
        assert version.shape == image.shape
        assert version.min() >= 0
        assert version.max() <= 1
    assert image.equal(original)


def test_jitter_leaves_an_image_alone_once_in_a_while() -> None:
    image = torch.rand(3, 4, 4)
    same = [jitter(image, image_generator(0, epoch, "a")).equal(image) for epoch in range(200)]
    assert 2 <= sum(same) <= 30  # one in sixteen


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (StudentConfig, {"model": "v", "levels": [3, 1]}, "ascending"),
        (StudentConfig, {"model": "v", "levels": 0}, "greater than or equal to 1"),
        (StudentConfig, {"model": "v", "model_args": {"img_size": 3}}, "img_size"),
        (StudentConfig, {"model": "v", "router": "none"}, "'sak-noiseless' or 'sum'"),
        (StudentConfig, {"model": "v", "modle": "w"}, "Extra inputs"),
        (PhaseConfig, {"steps": 10, "learning_rate": "1e-3"}, "valid number"),
        (PhaseConfig, {"steps": 0, "learning_rate": 1.0}, "greater than or equal to 1"),
        (RuntimeConfig, {"precision": "fp8"}, "'fp32'"),
    ],
)
def test_settings_are_checked(model: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model.model_validate(values)  # type: ignore[attr-defined]


def test_levels_may_be_a_list_or_a_number() -> None:
    assert StudentConfig.model_validate({"model": "v", "levels": [1, 3]}).levels == (1, 3)
    assert StudentConfig.model_validate({"model": "v"}).levels == 4


def test_a_device_that_is_not_there_is_refused() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(DeviceError, match="'gpu' cannot be used"):
        pick_device("gpu")
