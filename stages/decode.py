"""Codes become features on the device that needs them, so that only codes travel.

The counterpart in torch of the codecs' own `decode`, for whole batches.

Letters: `B` batch, `h w` cells of a level, `C` channels, `K` components or stored bytes.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from store.codecs import BitCodec, Codec, FloatCodec, Int8Codec
from store.threads import each_in_threads

Decode = Callable[[Tensor], Tensor]
"""Maps codes B h w K of a target, on the decoder's device, to its values B h w C float32."""

_Law = Callable[[Tensor, Tensor, Tensor], Tensor]

_SERIAL_VALUES = 2**15
"""Numbers from which on torch divides an operation between threads. Parts of fewer stay in a core's
cache, and these threads need not wait for one another after every operation, which took seconds
where other processes had the cores."""


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
        self._law = _square_law_on(device)

    def __call__(self, codes: Tensor) -> Tensor:
        tokens = codes.reshape(-1, codes.shape[-1])
        if self._axes is None:
            values = self._law(tokens, self._scale, self._offset)
        else:
            components = self._law(tokens, self._scale, torch.zeros_like(self._scale))
            values = torch.addmm(self._offset, components, self._axes)
        return values.view(*codes.shape[:-1], len(self._offset))


def square_law(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return `codes * abs(codes) * scale + offset`: codes n K int8; scale, offset K float32.

    Three passes over memory where each operation runs alone, one where they are compiled.
    """
    roots = codes.float()
    return torch.addcmul(offset, roots * roots.abs(), scale)


def square_law_in_cache(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return what `square_law` does, on a processor: what one step writes the next finds in cache.

    Twice as fast as four operations on the whole batch (docs/results/streaming.md).
    """
    values = torch.empty(codes.shape)
    step = max(1, (_SERIAL_VALUES - 1) // codes.shape[1])

    def fill(first: int) -> None:
        some, part = codes[first : first + step], values[first : first + step]
        part.copy_(some)
        part.mul_(part.abs())
        torch.addcmul(offset, part, scale, out=part)

    each_in_threads(fill, range(0, len(codes), step), min(torch.get_num_threads(), 4))
    return values


@cache
def compiled_square_law() -> _Law:
    """Return `square_law` as one kernel for batches and levels of any size."""
    return torch.compile(square_law, dynamic=True, fullgraph=True)


def _square_law_on(device: torch.device) -> _Law:
    if device.type == "cpu":
        return square_law_in_cache
    # Triton, which makes the kernel, comes with torch for CUDA on Linux, not everywhere.
    return compiled_square_law() if device.type == "cuda" and find_spec("triton") else square_law


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
