"""The head of one dense task.

Shapes: `B` batch, `h w` the stem's grid, `D` stem width, `C` task channels, `H W` image pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def level_widths(width: int, levels: int) -> tuple[int, ...]:
    """Split a width over levels as evenly as possible, so that the parts add up to it.

    Four levels of a width divisible by four give a quarter each, as in the paper; a remainder
    goes to the first levels, one channel each.
    """
    share, rest = divmod(width, levels)
    return tuple(share + (index < rest) for index in range(levels))


class DenseHead(nn.Module):
    """Reduce each level, join them at a quarter of the image size, convolve, classify."""

    def __init__(self, width: int, levels: int, channels: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, part) for part in level_widths(width, levels))
        self.linear_fuse = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, padding=1), nn.BatchNorm2d(width), nn.GELU()
        )
        self.last_conv = nn.Conv2d(width, channels, kernel_size=1)
        # levels arrive channels last; weights in the same format spare a quarter of the time
        self.to(memory_format=torch.channels_last)

    def forward(self, levels: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Return logits `B C H W` of levels `B h w D`; H and W are `image_size`.

        All levels share the stem's grid, so they are joined before the one upsampling.
        """
        reduced = [linear(level) for linear, level in zip(self.linears, levels, strict=True)]
        joined = torch.cat(reduced, dim=-1).permute(0, 3, 1, 2)
        quarter = (max(1, image_size[0] // 4), max(1, image_size[1] // 4))
        fused = self.linear_fuse(F.interpolate(joined, size=quarter, mode="bilinear"))
        return F.interpolate(self.last_conv(fused).float(), size=image_size, mode="bilinear")
