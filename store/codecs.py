"""How a target is stored: plain floats, or codes with the arrays that decode them.

A codec is made once per (level, resolution) from calibration rows, see `store.calibrate`, and then
only encodes and decodes. Every row is worked on alone, so that the same bits come out whatever
batch it came in and however it lay in memory (a product of matrices depends on that).

Shapes: `H W` grid, `C` channels, `K` kept components, `D` values of a block of tokens.
"""

import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError

FLOATS = {"float32": "<f4", "float16": "<f2"}
FLOAT16_MAX = float(np.finfo(np.float16).max)

Values = NDArray[np.floating[Any]]
Codes = NDArray[Any]
Shape = tuple[int, ...]

_CACHED_VALUES = 2**15
"""Numbers worked on at a time: 128 KiB of float32 fit the caches that every core has."""

_INT8 = re.compile(r"int8(?:-(?P<rotation>hadamard|pca)(?P<kept>[1-9]\d{0,4})?)?")
_BITS = re.compile(r"pca-(?P<bits>[1-6])bit")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecName:
    """What a codec's name says.

    `rotation` is None, "hadamard" or "pca"; `kept` is how many principal components stay (None:
    all); `bits` is the mean number of bits per value of the low-rate codecs, else None.
    """

    name: str
    rotation: str | None = None
    kept: int | None = None
    bits: int | None = None

    @property
    def is_float(self) -> bool:
        """Whether nothing has to be fitted."""
        return self.name in FLOATS


def parse_codec(name: str) -> CodecName:
    """Return what a codec's name says.

    `float32`, `float16`; `int8`, `int8-hadamard`, `int8-pca`, `int8-pca192` (principal components
    kept); `pca-4bit` and likewise from 1 to 6 (mean bits per value).

    Raises:
        StoreError: there is no codec of that name.
    """
    if name in FLOATS:
        return CodecName(name=name)
    if (match := _INT8.fullmatch(name)) and not (match["kept"] and match["rotation"] != "pca"):
        kept = int(match["kept"]) if match["kept"] else None
        return CodecName(name=name, rotation=match["rotation"], kept=kept)
    if match := _BITS.fullmatch(name):
        return CodecName(name=name, rotation="pca", bits=int(match["bits"]))
    raise StoreError(
        f"there is no codec {name!r}: use float32, float16, int8, int8-hadamard, int8-pca, "
        "int8-pcaK (K components kept) or pca-Bbit (B from 1 to 6)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatCodec:
    """Stores the numbers themselves; `dtype` is `<f4` or `<f2`."""

    dtype: str

    def stored_shape(self, row: Shape) -> Shape:
        """Return the target's own shape."""
        return row

    def encode(self, row: Values) -> Codes:
        """Round to the stored type."""
        return row.astype(self.dtype)

    def decode(self, codes: Codes, out: NDArray[np.float32] | None = None) -> Values:
        """Return the codes, which are the values; in float32 where `out` is given."""
        if out is None:
            return codes
        np.copyto(out, codes)
        return out

    def parameters(self) -> dict[str, NDArray[Any]]:
        """Return nothing: none are needed."""
        return {}


class _Fitted:
    """What fitted codecs share: their fields are their parameters."""

    def parameters(self) -> dict[str, NDArray[Any]]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8Codec(_Fitted):
    """One byte per component, on steps that widen with the distance from the mean (square law).

        codes = codes.astype("float32")
        values = codes * abs(codes) * scale + offset                         # without rotation
        values = (codes * abs(codes) * scale) @ rotation + offset            # with

    Against even steps over the same range the error of small values is smaller and that of rare
    large ones no larger than they can bear: on all levels measured the cosine and the relative
    error were better. `scale` is (K,) float32; `offset` (C,) float32 is the mean; `rotation` (K, C)
    float16 has orthonormal rows (None: none, K = C).
    """

    scale: NDArray[np.float32]
    offset: NDArray[np.float32]
    rotation: NDArray[np.float16] | None = None

    @property
    def dtype(self) -> str:
        """Signed bytes, -127 to 127."""
        return "|i1"

    def stored_shape(self, row: Shape) -> Shape:
        """Return (H, W, K)."""
        return (*row[:2], len(self.scale))

    def encode(self, row: Values) -> Codes:
        """Return the codes (H, W, K) nearest on the square-law scale."""
        values = np.ascontiguousarray(row, np.float32) - self.offset
        if self.rotation is not None:
            values = values @ self.axes.T
        steps = np.sqrt(np.abs(values) / self.scale)
        codes: Codes = np.copysign(np.minimum(np.rint(steps), 127), values).astype(np.int8)
        return codes

    @cached_property
    def axes(self) -> NDArray[np.float32]:
        """The rotation (K, C) in float32; there is one only where `rotation` is."""
        assert self.rotation is not None
        return self.rotation.astype(np.float32)

    def decode(self, codes: Codes, out: NDArray[np.float32] | None = None) -> Values:
        """Return the values (H, W, C) float32, in `out` (contiguous) where it is given."""
        shape = (*codes.shape[:2], len(self.offset))
        out = np.empty(shape, np.float32) if out is None else out
        if self.rotation is None:
            _square_law(codes, self.scale, self.offset, out)
            return out
        components = np.empty(codes.shape, np.float32)
        _square_law(codes, self.scale, None, components)
        np.matmul(components, self.axes, out=out)
        out += self.offset
        return out


@dataclass(frozen=True, kw_only=True, eq=False)
class BitCodec(_Fitted):
    """Principal components of blocks of tokens, each on as many uneven steps as it is worth.

        steps = (codes[..., byte] >> shift) & mask
        blocks = table[first + steps] @ rotation + mean          # (h, w, b * b * C), H = h * b
        tokens = blocks.reshape(h, w, b, b, -1).swapaxes(1, 2).reshape(h * b, w * b, -1)  # b > 1
        values = tokens * np.linalg.norm(tokens, axis=-1, keepdims=True)

    What is coded is a token over the root of its norm, so that small tokens, whose direction counts
    as much in a cosine, get smaller errors without a gain beside them. `byte`, `shift`, `mask`,
    `first` (K,) say where the steps of a component lie in a token's bytes and where its entries
    begin in `table`. Blocks of `block` x `block` tokens (one: the token) are
    coded together where a level has so few channels that its neighbours tell more than they do.
    """

    block: NDArray[np.int32]
    rotation: NDArray[np.float16]
    mean: NDArray[np.float32]
    byte: NDArray[np.int32]
    shift: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    first: NDArray[np.int32]
    table: NDArray[np.float32]

    @property
    def dtype(self) -> str:
        """Bytes."""
        return "|u1"

    def stored_shape(self, row: Shape) -> Shape:
        """Return (H / block, W / block, bytes of a block)."""
        edge = int(self.block)
        return row[0] // edge, row[1] // edge, int(self.byte.max()) + 1

    def encode(self, row: Values) -> Codes:
        """Return the nearest codes."""
        blocks = to_blocks(compress(np.ascontiguousarray(row, np.float32)), int(self.block))
        components = (blocks - self.mean) @ self.axes.T
        codes = np.zeros(self.stored_shape(row.shape), np.uint8)
        for index, (byte, shift) in enumerate(zip(self.byte, self.shift, strict=True)):
            steps = np.searchsorted(self.edges[index], components[..., index])
            codes[..., byte] |= (steps << shift).astype(np.uint8)
        return codes

    def decode(self, codes: Codes, out: NDArray[np.float32] | None = None) -> Values:
        """Return the values (H, W, C) float32, in `out` (contiguous) where it is given."""
        steps = (codes[..., self.byte] >> self.shift) & self.mask
        blocks = self.table[self.first + steps] @ self.axes
        blocks += self.mean
        tokens = from_blocks(blocks, int(self.block))
        norms = np.linalg.norm(tokens, axis=-1, keepdims=True)
        values: NDArray[np.float32] = np.multiply(tokens, norms, out=out)
        return values

    @cached_property
    def axes(self) -> NDArray[np.float32]:
        """The rotation (K, D) in float32."""
        return self.rotation.astype(np.float32)

    @cached_property
    def edges(self) -> tuple[NDArray[np.float32], ...]:
        """For each component the bounds between its steps: the middles of its table's entries."""
        ends = self.first + self.mask.astype(np.int64) + 1
        tables = [self.table[start:end] for start, end in zip(self.first, ends, strict=True)]
        return tuple(((one[1:] + one[:-1]) / 2).astype(np.float32) for one in tables)


Codec = FloatCodec | Int8Codec | BitCodec
"""Each has `dtype`, `stored_shape`, `encode` and `decode` of one row, and `parameters`."""


def _square_law(
    codes: Codes,
    scale: NDArray[np.float32],
    offset: NDArray[np.float32] | None,
    out: NDArray[np.float32],
) -> None:
    """Fill `out` with `codes * abs(codes) * scale + offset`, all (H, W, K).

    Some rows of the grid at a time, so that what one step writes the next one finds in cache.
    """
    height, width, kept = codes.shape
    flat, wide = codes.reshape(height, width * kept), out.reshape(height, width * kept)
    scales, offsets = np.tile(scale, width), None if offset is None else np.tile(offset, width)
    step = max(1, _CACHED_VALUES // (width * kept))
    magnitude = np.empty((min(step, height), width * kept), np.float32)
    for start in range(0, height, step):
        part = wide[start : start + step]
        np.copyto(part, flat[start : start + step])
        part *= np.abs(part, out=magnitude[: len(part)])
        part *= scales
        if offsets is not None:
            part += offsets


def compress(tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return tokens (..., C) over the root of their norm; `y * norm(y)` undoes it."""
    norms = np.linalg.norm(tokens, axis=-1, keepdims=True)
    compressed: NDArray[np.float32] = tokens / np.sqrt(np.maximum(norms, np.float32(1e-12)))
    return compressed


def to_blocks(row: NDArray[np.float32], edge: int) -> NDArray[np.float32]:
    """Return (H / edge, W / edge, edge * edge * C) of a row (H, W, C)."""
    height, width, channels = row.shape
    tiles = row.reshape(height // edge, edge, width // edge, edge, channels)
    return tiles.swapaxes(1, 2).reshape(height // edge, width // edge, -1)


def from_blocks(blocks: NDArray[np.float32], edge: int) -> NDArray[np.float32]:
    """Return the row (H, W, C) that `to_blocks` cut."""
    if edge == 1:
        return blocks
    height, width, values = blocks.shape
    tiles = blocks.reshape(height, width, edge, edge, values // edge**2)
    return tiles.swapaxes(1, 2).reshape(height * edge, width * edge, -1)
