"""Photometric jitter of the student's image; the teachers saw the clean one."""

import hashlib

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

BRIGHTNESS = 32 / 255
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18 / 360


def image_generator(seed: int, epoch: int, image_id: str) -> np.random.Generator:
    """Return the random numbers of one image in one epoch, whoever asks and in whatever order."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{image_id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def jitter(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue, each with probability one half.

    `image` is `3 H W` float32 in [0, 1], and so is the result. Ranges are those of the published
    protocol; brightness is added, as there.
    """
    chosen = generator.random(4) < 0.5
    brightness = generator.uniform(-BRIGHTNESS, BRIGHTNESS)
    contrast, saturation = generator.uniform(*CONTRAST), generator.uniform(*SATURATION)
    hue = generator.uniform(-HUE, HUE)
    if chosen[0]:
        image = (image + brightness).clamp(0, 1)
    if chosen[1]:
        image = TF.adjust_contrast(image, contrast)
    if chosen[2]:
        image = TF.adjust_saturation(image, saturation)
    if chosen[3]:
        image = TF.adjust_hue(image, hue)
    return image
