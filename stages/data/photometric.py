"""Colours of a view: brightness, contrast, saturation and hue, changed in whole 8-bit values.

Pillow does the arithmetic, so the same pixels and factors give the same bytes to whoever asks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance


@dataclass(frozen=True, slots=True, kw_only=True)
class Photometric:
    """Factors of brightness, contrast and saturation (1 changes nothing), shift of hue in turns."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def change_colours(
    pixels: npt.NDArray[np.uint8], photometric: Photometric
) -> npt.NDArray[np.uint8]:
    """Return an H x W x 3 image with its colours changed, in the order of the fields.

    Brightness blends with black, contrast with the mean grey of these pixels, saturation with each
    pixel's grey (`PIL.ImageEnhance`); hue turns in 256 steps, and keeps pixels where that is none.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    for enhance, factor in (
        (ImageEnhance.Brightness, photometric.brightness),
        (ImageEnhance.Contrast, photometric.contrast),
        (ImageEnhance.Color, photometric.saturation),
    ):
        if factor != 1:
            image = enhance(image).enhance(factor)
    steps = round(photometric.hue * 256) % 256
    if steps:
        hue, saturation, value = image.convert("HSV").split()
        turned = hue.point([(step + steps) % 256 for step in range(256)])
        image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    return np.array(image)
