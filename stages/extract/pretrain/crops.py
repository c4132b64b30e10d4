"""Random crops shared by the three objectives."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stages.extract.pretrain.scenes_cache import Batch


def random_crop(batch: Batch, generator: torch.Generator, smallest: float, flip: bool) -> Batch:
    """Cut a window of the image's aspect ratio out of each image and resize it back.

    The side of a window is drawn uniformly between `smallest` and 1 of the image's side.
    `flip` mirrors half of the windows; captions that speak of left and right forbid it.
    """
    count = len(batch.captions)
    side = smallest + (1 - smallest) * torch.rand(count, generator=generator)
    centre = (2 * torch.rand(2, count, generator=generator) - 1) * (1 - side)
    mirror = torch.ones(count)
    if flip:
        mirror -= 2.0 * (torch.rand(count, generator=generator) < 0.5)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side * mirror, side
    theta[:, :, 2] = centre.T
    window = F.affine_grid(theta, list(batch.images.shape), align_corners=False)
    return Batch(
        images=_sample(batch.images, window, "bilinear"),
        instances=_sample(batch.instances[:, None].float(), window, "nearest")[:, 0].long(),
        corners=batch.corners,
        captions=batch.captions,
    )


def cut(
    images: Float[Tensor, "B 3 H W"], corners: Int[Tensor, "B 2"], size: tuple[int, int]
) -> Float[Tensor, "B 3 h w"]:
    """Cut a window of `size` (height, width) out of each image at its own corner."""
    height, width = size
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(images, corners.tolist(), strict=True)
        ]
    )


def jitter_light(
    images: Float[Tensor, "B 3 H W"], generator: torch.Generator, strength: float
) -> Float[Tensor, "B 3 H W"]:
    """Change the contrast of normalised images by up to +-`strength` and shift them as much.

    Hue stays, since captions name colours.
    """
    scale, shift = (
        strength * (2 * torch.rand(2, len(images), 1, 1, 1, generator=generator) - 1)
    ).unbind()
    return images * (1 + scale) + shift


def _sample(
    values: Float[Tensor, "B C H W"], window: Float[Tensor, "B H W 2"], mode: str
) -> Float[Tensor, "B C H W"]:
    return F.grid_sample(values, window, mode=mode, padding_mode="border", align_corners=False)
