import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms

from stages.data.view import Box, whole_image_box
from stages.extract.geometry import InputFrame
from stages.extract.preprocess import Preprocessing, probe_digest, probe_image

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def preprocessing(size: tuple[int, int], content: tuple[int, int] | None = None) -> Preprocessing:
    frame = InputFrame(size=size, content=content or size)
    return Preprocessing(frame=frame, mean=MEAN, std=STD, interpolation="bicubic")


def network_input(steps: Preprocessing, image: np.ndarray, box: Box) -> torch.Tensor:
    return steps.normalise(steps(image, box)[None])[0]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


def test_a_whole_image_is_treated_as_the_libraries_do(image: np.ndarray) -> None:
    theirs = transforms.Compose(
        [
            transforms.Resize((48, 64), transforms.InterpolationMode.BICUBIC),
            transforms.ToImage(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(MEAN, STD),
        ]
    )
    ours = network_input(preprocessing((48, 64)), image, whole_image_box(60, 80, (48, 64)))
    torch.testing.assert_close(ours, theirs(Image.fromarray(image)))


def test_only_the_box_is_seen(image: np.ndarray) -> None:
    box = Box(top=10, left=20, height=30, width=40)
    inside = image[10:40, 20:60].copy()
    everything = Box(top=0, left=0, height=30, width=40)
    assert torch.equal(
        preprocessing((32, 48))(image, box), preprocessing((32, 48))(inside, everything)
    )


def test_padding_is_zero_to_the_right_and_below(image: np.ndarray) -> None:
    box = whole_image_box(60, 80, (48, 64))
    padded = network_input(preprocessing((64, 64), (48, 64)), image, box)
    assert padded.shape == (3, 64, 64)
    assert torch.equal(padded[:, :48], network_input(preprocessing((48, 64)), image, box))
    assert not padded[:, 48:].any()


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (0.48, 0.46, 0.42)},
        {"std": (0.27, 0.27, 0.28)},
        {"interpolation": "bilinear"},
        {"frame": InputFrame(size=(48, 48), content=(48, 48))},
        {"frame": InputFrame(size=(64, 64), content=(48, 64))},
    ],
    ids=str,
)
def test_the_probe_notices_every_change_of_preprocessing(change: dict[str, object]) -> None:
    base = preprocessing((48, 64))
    view = (48, 64)
    assert probe_digest(base, view) == probe_digest(preprocessing((48, 64)), view)
    assert probe_digest(dataclasses.replace(base, **change), view) != probe_digest(base, view)


def test_the_probe_has_fine_and_coarse_structure_in_all_channels() -> None:
    image = probe_image()
    assert image.dtype == np.uint8
    assert len({channel.tobytes() for channel in np.moveaxis(image, -1, 0)}) == 3
    assert all(np.ptp(channel) > 150 for channel in np.moveaxis(image, -1, 0))
