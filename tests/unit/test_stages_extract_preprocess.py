import dataclasses

import numpy as np
import open_clip
import pytest
import timm
import timm.data
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms

from stages.data.view import Box, whole, whole_image_box
from stages.extract.config import TeacherConfig
from stages.extract.geometry import InputFrame
from stages.extract.preprocess import Preprocessing, probe_digest, probe_image
from stages.extract.provenance import choose_preprocessing, network_source

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def preprocessing(size: tuple[int, int], content: tuple[int, int] | None = None) -> Preprocessing:
    frame = InputFrame(size=size, content=content or size)
    return Preprocessing(frame=frame, mean=MEAN, std=STD, interpolation="bicubic")


def network_input(steps: Preprocessing, image: np.ndarray, box: Box) -> torch.Tensor:
    return steps.normalise(steps(image, box)[None])[0]


def assert_within_a_step(ours: torch.Tensor, theirs: torch.Tensor, std: tuple[float, ...]) -> None:
    """Resized by torch and by Pillow: few values differ, by one of 255 steps (see Preprocessing)."""
    steps = (ours - theirs).abs() * 255 * torch.tensor(std).view(3, 1, 1)
    assert float(steps.max()) < 1.01
    assert float((steps > 0.01).float().mean()) < 0.02


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
    assert_within_a_step(ours, theirs(Image.fromarray(image)), STD)


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


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(24, 32), (45, 60), (60, 80), (90, 120), (150, 200)])
def test_bytes_are_pillows_to_within_two_steps(
    image: np.ndarray, interpolation: str, size: tuple[int, int]
) -> None:
    steps = dataclasses.replace(preprocessing(size), interpolation=interpolation)
    ours = steps(image, whole(image)).numpy().astype(int)
    kernel = Image.Resampling[interpolation.upper()]
    theirs = np.asarray(Image.fromarray(image).resize(size[::-1], kernel)).astype(int)
    assert np.abs(ours - theirs).max() <= (1 if interpolation == "bilinear" else 2)
    assert (ours != theirs).mean() < 0.02


def test_inputs_do_not_depend_on_what_they_are_batched_or_padded_with(image: np.ndarray) -> None:
    steps = preprocessing((48, 64))
    other = steps(image[::-1].copy(), whole(image))
    pixels = steps(image, whole(image))
    together = steps.normalise(torch.stack([other, pixels]))
    assert torch.equal(together[1], steps.normalise(pixels[None])[0])


def test_read_only_and_mirrored_images_are_taken(image: np.ndarray) -> None:
    steps = preprocessing((60, 80))
    image.flags.writeable = False
    for one in (image, image[:, ::-1]):
        assert np.array_equal(steps(one, whole(one)).numpy(), one)


VIEW = (48, 64)
SOURCES = (
    "timm:vit_small_patch14_dinov2.lvd142m",
    "timm:vit_base_patch16_siglip_224.webli",
    "timm:mobilenetv3_small_050.lamb_in1k",
)


def configured(source: str) -> Preprocessing:
    config = TeacherConfig(source=source)
    return choose_preprocessing(config, network_source(config).outline(), VIEW)


@pytest.mark.parametrize("source", SOURCES)
def test_inputs_are_those_of_timms_own_transform(source: str, image: np.ndarray) -> None:
    """Without a crop, to within a step of a byte: the same resize, mean and standard deviation."""
    steps = configured(source)
    settings = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg(source.partition(":")[2]).to_dict()
    )
    size = {"input_size": (3, *steps.frame.size), "crop_pct": 1.0, "crop_mode": "squash"}
    theirs = timm.data.create_transform(**(settings | size))(Image.fromarray(image))
    ours = network_input(steps, image, whole_image_box(60, 80, VIEW))
    assert_within_a_step(ours, theirs, steps.std)


@pytest.mark.parametrize("name", ["ViT-B-16/openai", "ViT-B-16-SigLIP/webli"])
def test_inputs_are_those_of_open_clips_own_transform(name: str, image: np.ndarray) -> None:
    steps = configured(f"open_clip:{name}")
    settings = open_clip.get_pretrained_cfg(*name.split("/"))
    transform = open_clip.image_transform(
        steps.frame.size,
        is_train=False,
        mean=settings["mean"],
        std=settings["std"],
        interpolation=settings["interpolation"],
        resize_mode="squash",
    )
    ours = network_input(steps, image, whole_image_box(60, 80, VIEW))
    assert_within_a_step(ours, transform(Image.fromarray(image)), steps.std)


def test_memory_order_changes_no_value(image: np.ndarray) -> None:
    steps = preprocessing((64, 64), (48, 64))
    pixels = torch.stack([steps(image, whole_image_box(60, 80, VIEW))] * 2)
    last = steps.normalise(pixels, torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, steps.normalise(pixels))
