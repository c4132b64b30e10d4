"""Codecs in the store: what a teacher's description says of them, and their arrays on disk.

The arrays lie at `<teacher>/<level>/codec/<resolution>/<name>`, with `fidelity` among them: cosine
mean, cosine 1st percentile, relative L2 error.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.calibration import Fidelity, FittedTarget
from store.chunks import read_array, write_array
from store.codecs import parse_codec
from store.errors import StoreDamagedError, StoreError
from store.remote import StorePath
from store.restore import block_edge, check_forms, restore_codec
from store.spec import Target, TeacherSpec
from store.teacher_layout import StoredCodec, codec_folder, codec_layouts

Calibrate = Callable[[], Mapping[str, FittedTarget]]
"""Fits the codec of every target of a teacher, by target name."""


def calibrate_codecs(
    folder: StorePath, spec: TeacherSpec, calibrate: Calibrate | None
) -> dict[str, StoredCodec]:
    """Fit and place the codecs of a new teacher; none where floats are stored.

    Raises:
        StoreError: a codec has to be fitted, and there is no `calibrate`.
    """
    if parse_codec(spec.codec).is_float:
        return {}
    if calibrate is None:
        raise StoreError(f"codec {spec.codec} of teacher {spec.name!r} has to be fitted to rows")
    fitted = calibrate()
    codecs = {}
    for target in spec.targets:
        codecs[target.name] = describe_codec(spec.codec, target, fitted[target.name])
        write_codec(folder, target, codecs[target.name], fitted[target.name])
    return codecs


def read_stored_codecs(attributes: object) -> dict[str, StoredCodec]:
    """Return what a teacher's attributes say of its codecs, by target name.

    Raises:
        StoreError: they describe no codecs.
    """
    if not isinstance(attributes, dict):
        raise StoreError(f"codecs must be an object, got {attributes!r:.80}")
    try:
        return {str(name): StoredCodec.from_attributes(entry) for name, entry in attributes.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the attributes describe no codecs: {error!r}") from error


def describe_codec(name: str, target: Target, fitted: FittedTarget) -> StoredCodec:
    """Return what a teacher's description says of a codec."""
    arrays = _arrays(fitted)
    row = (*target.grid, target.channels)
    return StoredCodec(
        name=name,
        dtype=fitted.codec.dtype,
        row_shape=fitted.codec.stored_shape(row),
        parameters={key: (value.dtype.str, value.shape) for key, value in arrays.items()},
        digest=_digest(arrays),
    )


def check_codec(name: str, target: Target, stored: StoredCodec) -> None:
    """Refuse a description that no codec of that name gives for the target; opens no file.

    Raises:
        StoreDamagedError: another codec, or arrays or rows of other dtypes or shapes.
    """
    forms = dict(stored.parameters)
    if stored.name != name or forms.pop("fidelity", None) != ("<f8", (3,)):
        raise StoreDamagedError(f"target {target.name} should have codec {name} and its fidelity")
    check_forms(name, forms, target.channels)
    kept = forms["scale" if "scale" in forms else "byte"][1][0]
    edge, dtype = 1, "|i1"
    if parse_codec(name).bits is not None:
        edge, dtype = block_edge(forms["mean"][1][0], target.channels), "|u1"
        kept = min((kept, *stored.row_shape[-1:]))  # bytes: each holds a component
    blocks = tuple(side // edge for side in target.grid)
    whole = tuple(side * edge for side in blocks) == target.grid
    if not whole or (stored.dtype, stored.row_shape) != (dtype, (*blocks, kept)):
        raise StoreDamagedError(
            f"rows of target {target.name} cannot be {stored.dtype} {stored.row_shape}"
        )


def write_codec(
    folder: StorePath, target: Target, stored: StoredCodec, fitted: FittedTarget
) -> None:
    """Place the arrays of one target's codec below a teacher's folder."""
    arrays = _arrays(fitted)
    for name, layout in codec_layouts(target, stored).items():
        write_array(folder, layout, arrays[name])


def read_codec(folder: StorePath, target: Target, stored: StoredCodec) -> FittedTarget:
    """Return the codec of one target.

    Raises:
        StoreDamagedError: its arrays are not those that were written with the teacher.
    """
    check_codec(stored.name, target, stored)
    where = folder / codec_folder(target)
    try:
        return _read_codec(folder, target, stored)
    except StoreDamagedError as error:
        raise StoreDamagedError(
            f"{error}. Without {where} nothing at this resolution can be decoded: put these files "
            f"back from a copy, or delete {folder} and run `sak extract-teachers {folder.name}`"
        ) from error


def _read_codec(folder: StorePath, target: Target, stored: StoredCodec) -> FittedTarget:
    arrays = {
        name: read_array(folder, layout) for name, layout in codec_layouts(target, stored).items()
    }
    where = folder / codec_folder(target)
    if _digest(arrays) != stored.digest:
        raise StoreDamagedError(f"{where} does not have the digest that the teacher records")
    figures = arrays.pop("fidelity")
    codec = restore_codec(stored.name, arrays, target.channels)
    row = (*target.grid, target.channels)
    if codec.stored_shape(row) != stored.row_shape or not np.isfinite(figures).all():
        raise StoreDamagedError(f"{where} does not fit a level of {row}")
    mean, low, error = (float(value) for value in figures)
    fidelity = Fidelity(cosine_mean=mean, cosine_p01=low, relative_l2=error)
    return FittedTarget(codec=codec, fidelity=fidelity)


def _arrays(fitted: FittedTarget) -> dict[str, NDArray[Any]]:
    return {**fitted.codec.parameters(), "fidelity": np.array(astuple(fitted.fidelity), "<f8")}


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    state = hashlib.sha256()
    for name in sorted(arrays):
        state.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        state.update(np.ascontiguousarray(arrays[name]).tobytes())
    return state.hexdigest()
