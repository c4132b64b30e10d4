"""A level at a smaller resolution, in torch: what extraction stores and online training matches."""

import torch
from torch import Tensor

from store.pyramid import area_weights
from store.spec import Grid


def area_average(values: Tensor, grid: Grid) -> Tensor:
    """Return B h w C of values B H W C, each cell the mean over its area, as `store.pyramid`."""
    height, width = values.shape[1:3]
    if (height, width) == grid:
        return values
    down, across = (
        torch.from_numpy(area_weights(size, cells)).to(values.device)
        for size, cells in zip((height, width), grid, strict=True)
    )
    rows = torch.matmul(down, values.flatten(2)).view(len(values), len(down), width, -1)
    return torch.matmul(across, rows)
