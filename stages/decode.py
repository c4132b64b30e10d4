"""Codes become features on the device that needs them, so that only codes travel.

The counterpart in torch of the codecs' own `decode`, for whole batches.

Letters: `B` batch, `h w` cells of a level, `C` channels, `K` components or stored bytes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from store.codecs import BitCodec, Codec, FloatCodec, Int8Codec

Decode = Callable[[Tensor], Tensor]
"""Maps codes B h w K of a target, on the decoder's device, to its values B h w C float32."""


def decoder(codec: Codec, device: torch.device) -> Decode:
    """Return what decodes on a device; pooled outputs B C, which are floats, pass as well."""
    if isinstance(codec, FloatCodec):
        return Tensor.float
    return (
        _Int8Decoder(codec, device) if isinstance(codec, Int8Codec) else _BitDecoder(codec, device)
    )


class _Int8Decoder:
    """`Int8Codec.decode` of a batch."""

    def __init__(self, codec: Int8Codec, device: torch.device) -> None:
        self._scale = torch.from_numpy(codec.scale).to(device)
        self._offset = torch.from_numpy(codec.offset).to(device)
        self._axes = None if codec.rotation is None else torch.from_numpy(codec.axes).to(device)

    def __call__(self, codes: Tensor) -> Tensor:
        roots = codes.float()
        components = roots.mul_(roots.abs()).mul_(self._scale)
        if self._axes is not None:
            components = components @ self._axes
        return components.add_(self._offset)


class _BitDecoder:
    """`BitCodec.decode` of a batch."""

    def __init__(self, codec: BitCodec, device: torch.device) -> None:
        self._edge = int(codec.block)
        self._axes = torch.from_numpy(codec.axes).to(device)
        self._mean = torch.from_numpy(codec.mean).to(device)
        self._byte = torch.from_numpy(codec.byte).to(device)
        self._shift = torch.from_numpy(codec.shift).to(device)
        self._mask = torch.from_numpy(codec.mask).to(device)
        self._first = torch.from_numpy(codec.first).to(device)
        self._table = torch.from_numpy(codec.table).to(device)

    def __call__(self, codes: Tensor) -> Tensor:
        steps = (codes.index_select(-1, self._byte) >> self._shift) & self._mask
        blocks = self._table[self._first + steps.int()] @ self._axes
        tokens = self._from_blocks(blocks.add_(self._mean))
        norms: Tensor = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
        return tokens * norms

    def _from_blocks(self, blocks: Tensor) -> Tensor:
        """B h w (edge * edge * C) -> B H W C."""
        batch, height, width, values = blocks.shape
        edge, channels = self._edge, values // self._edge**2
        tiles = blocks.view(batch, height, width, edge, edge, channels)
        return tiles.transpose(2, 3).reshape(batch, height * edge, width * edge, channels)
