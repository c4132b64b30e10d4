"""Turns arrays found in a store back into a codec, or refuses them.

First the forms, (dtype, shape) by name, are compared with the only ones that a codec of that name
can have for so many channels; only then is a file opened. What the arrays hold comes last.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs import FLOATS, BitCodec, Codec, CodecName, FloatCodec, Int8Codec, parse_codec
from store.errors import StoreDamagedError
from store.fit import MAX_BITS

Forms = Mapping[str, tuple[str, tuple[int, ...]]]
_Arrays = Mapping[str, NDArray[Any]]


def restore_codec(name: str, parameters: _Arrays, channels: int) -> Codec:
    """Return the codec that `parameters` gave, of a level of so many channels.

    Raises:
        StoreDamagedError: the arrays are not those of this codec, or do not fit each other.
    """
    parsed = parse_codec(name)
    check_forms(
        name, {key: (array.dtype.str, array.shape) for key, array in parameters.items()}, channels
    )
    for key, array in parameters.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise StoreDamagedError(f"{key} of codec {name} holds NaN or infinity")
    if parsed.is_float:
        return FloatCodec(dtype=FLOATS[name])
    if parsed.bits is None:
        if not (parameters["scale"] > 0).all():
            raise StoreDamagedError(f"scale of codec {name} must be above 0")
        return Int8Codec(**parameters)
    _check_places(name, parameters, channels)
    return BitCodec(**parameters)


def check_forms(name: str, forms: Forms, channels: int) -> None:
    """Refuse arrays that no codec of that name can have.

    Raises:
        StoreDamagedError: an array is missing, unknown, or of another dtype or shape.
    """
    parsed = parse_codec(name)
    expected = _low_rate(forms, channels) if parsed.bits else _int8(parsed, channels)
    for key in {**expected, **forms}:
        if forms.get(key) != expected.get(key):
            raise StoreDamagedError(
                f"{key!r} of codec {name} for {channels} channels should be {expected.get(key)}, "
                f"it is {forms.get(key)!r:.80}"
            )


def _int8(parsed: CodecName, channels: int) -> Forms:
    if parsed.is_float:
        return {}
    kept = channels if parsed.kept is None else parsed.kept
    if kept > channels:
        raise StoreDamagedError(f"codec {parsed.name} keeps more than {channels} channels")
    forms = {"scale": ("<f4", (kept,)), "offset": ("<f4", (channels,))}
    return forms if parsed.rotation is None else {**forms, "rotation": ("<f2", (kept, channels))}


def _low_rate(forms: Forms, channels: int) -> Forms:
    """Return the forms for as many components and table entries as there are."""
    values, kept, entries = (
        math.prod(forms[key][1]) if key in forms else 0 for key in ("mean", "byte", "table")
    )
    edge = block_edge(values, channels)
    if edge**2 * channels != values or not kept <= values or not entries <= 2**MAX_BITS * kept:
        raise StoreDamagedError(
            f"{kept} components of {values} values with {entries} steps are no low-rate codec "
            f"for {channels} channels"
        )
    return {
        "block": ("<i4", ()),
        "rotation": ("<f2", (kept, values)),
        "mean": ("<f4", (values,)),
        "byte": ("<i4", (kept,)),
        "shift": ("|u1", (kept,)),
        "mask": ("|u1", (kept,)),
        "first": ("<i4", (kept,)),
        "table": ("<f4", (entries,)),
    }


def block_edge(values: int, channels: int) -> int:
    """Return the edge of blocks of so many values, rounded down."""
    return math.isqrt(values // channels)


def _check_places(name: str, arrays: _Arrays, channels: int) -> None:
    """Refuse steps that overlap in a byte, or lie outside the bytes or the table."""
    byte, first = arrays["byte"].astype(np.int64), arrays["first"].astype(np.int64)
    mask, shift = arrays["mask"].astype(np.int64), arrays["shift"].astype(np.int64)
    fits = bool(
        int(arrays["block"]) == block_edge(len(arrays["mean"]), channels)
        and np.all((byte >= 0) & (byte < len(byte)) & (shift < MAX_BITS))
        and np.all((mask > 0) & (mask & (mask + 1) == 0) & (mask << shift < 2**MAX_BITS))
        and np.all((first >= 0) & (first + mask < len(arrays["table"])))
    )
    if fits:  # bits that overlap would add up to more than they cover
        covered, total = np.zeros((2, len(byte)), np.int64)
        np.bitwise_or.at(covered, byte, mask << shift)
        np.add.at(total, byte, mask << shift)
        fits = bool(np.array_equal(covered, total))
    if not fits:
        raise StoreDamagedError(f"block, byte, shift, mask and first of codec {name} do not fit")
