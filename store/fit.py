"""Fits a codec to sample tokens.

int8 takes the range of each component. The low-rate codecs are transform coding (Goyal 2001,
"Theoretical foundations of transform coding"): principal components, each quantised by Lloyd's
(1982) uneven steps, the bits given one by one to the component whose error falls most, by the
error measured on the sample.

Letters: `S` sample tiles, `T` edge of a tile in tokens, `C` channels, `D` values of a block.
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.codecs import (
    FLOATS,
    BitCodec,
    Codec,
    CodecName,
    FloatCodec,
    Int8Codec,
    compress,
    parse_codec,
    to_blocks,
)
from store.errors import StoreError
from store.hadamard import hadamard

MAX_BITS = 8
MAX_BLOCK_VALUES = 256
"""Blocks are as large as keeps their transform this small: 4 x 4 tokens of 16 channels."""
HEADROOM = 1.25
"""How far beyond the sample's range int8 reaches; the square law makes that cheap."""
_TINY = np.finfo(np.float32).tiny
_LLOYD_STEPS = 30
_KNOTS = 513


def fit_codec(name: str, tiles: NDArray[np.float32]) -> Codec:
    """Return the codec of that name for tokens like these, `tiles` (S, T, T, C).

    Raises:
        StoreError: no such codec, or the level has a shape that it cannot serve.
    """
    parsed = parse_codec(name)
    channels = tiles.shape[-1]
    if parsed.is_float:
        return FloatCodec(dtype=FLOATS[name])
    if parsed.bits is not None:
        return _fit_bits(tiles, parsed.bits)
    tokens = tiles.reshape(-1, channels)
    return _int8(tokens, _rotation(tokens, parsed))


def _rotation(tokens: NDArray[np.float32], parsed: CodecName) -> NDArray[np.float16] | None:
    channels = tokens.shape[1]
    if parsed.rotation is None:
        return None
    if parsed.rotation == "pca":
        if parsed.kept is not None and parsed.kept > channels:
            raise StoreError(f"{parsed.name} keeps more components than {channels} channels give")
        return _principal_axes(tokens)[: parsed.kept].astype(np.float16)
    matrix = hadamard(channels)
    if matrix is None:
        raise StoreError(f"no Hadamard matrix of order {channels} is known; use int8-pca")
    rotation: NDArray[np.float16] = (matrix / np.sqrt(channels)).astype(np.float16)
    return rotation


def _int8(tokens: NDArray[np.float32], rotation: NDArray[np.float16] | None) -> Int8Codec:
    mean = tokens.mean(axis=0, dtype=np.float64).astype(np.float32)  # float32 sums drift
    deviations = tokens - mean
    components = deviations if rotation is None else deviations @ rotation.T.astype(np.float32)
    reach = np.abs(components).max(axis=0) * np.float32(HEADROOM)
    scale = np.where(reach > 0, np.maximum(reach / 127**2, _TINY), 1).astype(
        np.float32
    )  # dead channels: any
    return Int8Codec(scale=scale, offset=mean, rotation=rotation)


def _principal_axes(tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return orthonormal rows (D, D), the direction of the largest variance first."""
    deviations = tokens - tokens.mean(axis=0, dtype=np.float64).astype(np.float32)
    axes: NDArray[np.float32] = np.linalg.eigh(deviations.T @ deviations)[1].T[::-1]
    return np.ascontiguousarray(axes)  # as it comes back from the store, for the same bits


def _fit_bits(tiles: NDArray[np.float32], bits: int) -> BitCodec:
    edge = _block_edge(tiles.shape[1], tiles.shape[-1])
    blocks = to_blocks(stack(compress(tiles)), edge).reshape(-1, edge**2 * tiles.shape[-1])
    mean = blocks.mean(axis=0, dtype=np.float64).astype(np.float32)
    rotation = _principal_axes(blocks).astype(np.float16)
    components = (blocks - mean) @ rotation.T.astype(np.float32)
    ladders = [_Ladder.fit(column) for column in np.ascontiguousarray(components.T)]
    budget = -(-bits * blocks.shape[1] // 8)
    given, places = _allocate(ladders, budget)
    kept = np.flatnonzero(given)
    tables = [ladders[index].steps[given[index]] for index in kept]
    return BitCodec(
        block=np.array(edge, np.int32),
        rotation=rotation[kept],
        mean=mean,
        byte=places[kept, 0].astype(np.int32),
        shift=places[kept, 1].astype(np.uint8),
        mask=np.array([len(table) - 1 for table in tables], np.uint8),
        first=np.cumsum([0, *map(len, tables[:-1])]).astype(np.int32),
        table=np.concatenate(tables).astype(np.float32),
    )


def stack(tiles: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return tiles (S, T, T, C) as one tall row (S * T, T, C), which every codec takes."""
    return tiles.reshape(-1, *tiles.shape[2:])


def _block_edge(tile: int, channels: int) -> int:
    return next(
        edge for edge in (4, 2, 1)
        if edge == 1 or (tile % edge == 0 and edge**2 * channels <= MAX_BLOCK_VALUES)
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ladder:
    """A component on 2**0 to 2**8 steps, and the squared error of each (falling)."""

    steps: list[NDArray[np.float64]]
    errors: NDArray[np.float64]

    @classmethod
    def fit(cls, values: NDArray[np.float32]) -> "_Ladder":
        """Place the steps of every size by Lloyd's iteration, on sorted values and their sums."""
        ordered = np.sort(values).astype(np.float64)
        sums = np.concatenate([[0.0], np.cumsum(ordered)])
        squares = float(ordered @ ordered)
        knots = np.quantile(ordered, np.linspace(0, 1, _KNOTS))
        # The best steps lie as dense as the third root of the density (Panter & Dite 1951). From
        # quantiles Lloyd's iteration would start too far off to arrive, from five bits on.
        share = np.concatenate([[0.0], np.cumsum(np.diff(knots) ** (2 / 3))])
        steps, errors = [], []
        for bits in range(MAX_BITS + 1):
            middles = (np.arange(2**bits) + 0.5) / 2**bits * share[-1]
            placed, error = _lloyd(ordered, sums, squares, np.interp(middles, share, knots))
            steps.append(placed)
            errors.append(error / len(ordered))
        return cls(steps=steps, errors=np.minimum.accumulate(errors))

    def gain(self, bits: int) -> float:
        """Return by how much the error falls with one bit more."""
        return float(self.errors[bits] - self.errors[bits + 1])


def _lloyd(
    ordered: NDArray[np.float64],
    sums: NDArray[np.float64],
    squares: float,
    steps: NDArray[np.float64],
) -> tuple[NDArray[np.float64], float]:
    """Return better steps than these, and the squared error that they leave."""
    for _ in range(_LLOYD_STEPS if len(steps) > 1 else 1):
        cuts = np.searchsorted(ordered, (steps[1:] + steps[:-1]) / 2)
        edges = np.concatenate([[0], cuts, [len(ordered)]])
        members = np.diff(edges)
        totals = np.diff(sums[edges])
        steps = np.where(members > 0, totals / np.maximum(members, 1), steps)
    # sum (v - s)^2 over a cell = sum v^2 - 2 s sum v + n s^2
    return steps, float(squares - 2 * steps @ totals + members @ steps**2)


def _allocate(ladders: list[_Ladder], budget: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return bits per component and their (byte, shift), all within `budget` bytes.

    A component lies within one byte. Bits are taken back, the least useful first, until all fit;
    what is then free in a byte goes to the components that lie there.
    """
    granted = _by_gain(ladders, 8 * budget)
    while True:
        given = np.bincount(granted, minlength=len(ladders))
        places = _pack(given, budget)
        if places is not None:
            break
        granted.pop()
    for byte in range(budget):
        members = np.flatnonzero((places[:, 0] == byte) & (given > 0))
        for _ in range(8 - int(given[members].sum())):
            open_to = [index for index in members if given[index] < MAX_BITS]
            if open_to:
                given[max(open_to, key=lambda index: ladders[index].gain(int(given[index])))] += 1
        places[members, 1] = np.cumsum([0, *given[members][:-1]])
    return given, places


def _by_gain(ladders: list[_Ladder], bits: int) -> list[int]:
    """Return which component gets each bit, in the order in which they are worth giving."""
    given = [0] * len(ladders)
    heap = [(-ladder.gain(0), index) for index, ladder in enumerate(ladders)]
    heapq.heapify(heap)
    granted: list[int] = []
    while heap and len(granted) < bits:
        _, index = heapq.heappop(heap)
        granted.append(index)
        given[index] += 1
        if given[index] < MAX_BITS:
            heapq.heappush(heap, (-ladders[index].gain(given[index]), index))
    return granted


def _pack(given: NDArray[np.int64], budget: int) -> NDArray[np.int64] | None:
    """Return (byte, shift) of each component, largest first into the first byte with room."""
    room = np.full(budget, 8)
    places = np.zeros((len(given), 2), np.int64)
    for index in np.argsort(-given, kind="stable"):
        if given[index] == 0:
            break
        fitting = np.flatnonzero(room >= given[index])
        if not len(fitting):
            return None
        places[index] = fitting[0], 8 - room[fitting[0]]
        room[fitting[0]] -= given[index]
    return places
