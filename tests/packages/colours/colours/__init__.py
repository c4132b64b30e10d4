"""A teacher that answers with mean colours; it needs torch, and nothing of sak."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class MeanColours(nn.Module):
    """Mean colour of each patch, and of each 2 x 2 of them, mixed by fixed weights."""

    reductions = (8, 16)
    native_size = (64, 64)
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    interpolation = "bilinear"
    licence = "mit"

    def __init__(self, size: tuple[int, int], channels: int = 5) -> None:
        super().__init__()
        self.size = size
        self.mix = nn.Linear(3, channels)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        fine = self.mix(functional.avg_pool2d(images, 8).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return [fine, functional.avg_pool2d(fine, 2)], fine.mean(dim=(2, 3))


class Mirrored(MeanColours):
    """Its coarse map is turned left to right."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        (fine, coarse), pooled = super().forward(images)
        return [fine, coarse.flip(3)], pooled


class Forgetful(MeanColours):
    """Drops values as if in training."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, pooled = super().forward(images)
        return [functional.dropout(one, 0.5, training=True) for one in maps], pooled


class Sociable(MeanColours):
    """Subtracts the mean of the batch."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, pooled = super().forward(images)
        return [one - one.mean(dim=0) for one in maps], pooled


class Unfinished(MeanColours):
    """Answers with nothing at dark places."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, pooled = super().forward(images)
        return [torch.where(one > 0, one, torch.nan) for one in maps], pooled


class Drifting(MeanColours):
    """Has other weights in every process."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size)
        nn.init.normal_(self.mix.weight, generator=_unseeded())


class Cropping(MeanColours):
    """Drops the border of its grid."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        (fine, coarse), pooled = super().forward(images)
        return [fine[:, :, 1:-1, 1:-1], coarse], pooled


class Silent(MeanColours):
    """Returns one map of two."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, pooled = super().forward(images)
        return maps[:1], pooled


class Broken(MeanColours):
    """Raises where it is called."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        raise KeyError("no such layer")


class Nameless(nn.Module):
    """Says nothing of its preprocessing."""

    reductions = (8,)


def _unseeded() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator
