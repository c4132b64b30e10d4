"""Decodes many rows, on the processor."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from store.codecs import Codec, Codes, Values
from store.threads import each_in_threads


def decode_rows(codec: Codec, codes: Codes, out: NDArray[np.float32] | None = None) -> Values:
    """Return the values (n, H, W, C) of codes (n, ...), n > 0; in `out` where it is given.

    Each row is decoded alone, so that the same bits come out whatever batch it is in.
    """
    first = codec.decode(codes[0], None if out is None else out[0])
    if out is None:
        out = np.empty((len(codes), *first.shape), first.dtype)
        out[0] = first
    for row, values in zip(codes[1:], out[1:], strict=True):
        codec.decode(row, values)
    return out


def decode_portions(
    read: Callable[[slice], Codes],
    codec: Codec,
    out: NDArray[np.float32],
    portion: int,
    threads: int,
) -> None:
    """Fill `out` (n, ...) with the values of what `read` gives of `portion` rows at a time."""

    def fill(start: int) -> None:
        part = slice(start, start + portion)
        decode_rows(codec, read(part), out[part])

    each_in_threads(fill, range(0, len(out), portion), threads)
