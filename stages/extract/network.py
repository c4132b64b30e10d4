"""What both model libraries hand over: facts about a network, then the network with weights.

Letters: `B` batch, `C` channels, `H W` pixels, `h w` cells of a level's grid.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Tapped = tuple[Sequence[Tensor], Tensor | None]
"""Maps B C h w, one per tapped layer and in their order, and the class token B C, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What is known of a network before its weights are loaded.

    `reductions` holds input pixels per grid cell for every layer that can be tapped; `native` is
    the size (H, W) it was trained at; `facts` go into the store's provenance as they are.
    """

    reductions: tuple[int, ...]
    native: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    facts: Mapping[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network with its weights; `tap` maps images B 3 H W through `module` to its layers.

    `weights` says where they came from; `reentrant` whether threads may run it at the same time.
    """

    module: nn.Module
    tap: Callable[[Tensor], Tapped]
    weights: str
    reentrant: bool = True


@runtime_checkable
class NetworkSource(Protocol):
    """A model of one library, not built yet."""

    def outline(self) -> Outline:
        """Describe the network without reading weights or allocating memory for them.

        Raises:
            TeacherError: no such model or tag, or arguments that it does not take.
        """
        ...

    def load(self, size: tuple[int, int], taps: tuple[int, ...]) -> Network:
        """Build the network for inputs of `size` (H, W), cut off after the last tapped layer.

        Raises:
            MissingWeightsError: no weights on this machine, and no download.
            WrongCheckpointError: the weights do not belong to this network.
        """
        ...


def best_memory_format(module: nn.Module) -> torch.memory_format:
    """Return channels last for convolutional networks, on which it is faster, else the usual.

    A network is one where more than one convolution overlaps its neighbours' pixels: patch
    embeddings do not, and Hiera and SAM have one that does.
    """
    overlapping = sum(
        isinstance(part, nn.Conv2d) and max(part.kernel_size) > max(part.stride)
        for part in module.modules()
    )
    return torch.channels_last if overlapping > 1 else torch.contiguous_format
