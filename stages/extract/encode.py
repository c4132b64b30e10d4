"""Features become codes on the device that computed them, so that only codes travel.

The counterpart in torch of `store.encode` and of the codecs' own `encode`: the same codes, but
where a value lies within float32 rounding of the middle between two of them.

Letters: `B` batch, `h w` cells of a level, `C` channels, `K` components, `E` edges of steps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.averaging import area_average
from stages.decode import Decode, decoder
from stages.extract.errors import NonFiniteFeaturesError
from stages.extract.moments import token_moments
from stages.extract.teachers import Features
from store.codecs import FLOAT16_MAX, BitCodec, Codec, Codes, FloatCodec, Int8Codec
from store.row_moments import PartMoments
from store.spec import GLOBAL, TeacherSpec
from store.statistics import Moments
from store.teacher_layout import TeacherLayout

_DTYPES = {"<f2": torch.float16, "<f4": torch.float32}
_CACHED_VALUES = 2**16
_FEW_EDGES = 63
"""Up to so many edges a processor compares with all of them sooner than it searches among them."""
_SHOWN = 5

Encode = Callable[[Tensor], Tensor]
"""Maps values B h w C float32 of a target to its codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What `FeatureWriter.write_codes` takes of n rows, by target name and `global`."""

    codes: dict[str, Codes]
    """(n, ...) of each array; zeros where no row is."""
    moments: dict[str, Iterable[Moments]]
    """Of the valid rows of each target, as they will be read."""


class Encoder:
    """Encodes what one teacher says, and sums up what a reader will get of it.

    `codecs` are by target name and `global`. Not to be shared between threads.
    """

    def __init__(self, layout: TeacherLayout, codecs: Mapping[str, Codec]) -> None:
        self._arrays = layout.features()
        self._covariance = layout.covariance
        self._codecs = codecs
        self._targets = {target.name: target for target in layout.spec.targets}
        self._moments = PartMoments(layout, codecs, _widen)
        self._encoders: dict[tuple[str, torch.device], tuple[Encode, Decode]] = {}

    def __call__(self, features: Features | None, valid: NDArray[np.bool_]) -> Encoded:
        """Return the codes of n rows; `features` are of those that `valid` (n,) marks, if any."""
        codes: dict[str, Codes] = {}
        moments: dict[str, Iterable[Moments]] = dict.fromkeys(self._targets, ())
        for name, array in self._arrays.items():
            if features is not None:
                codes[name], moments[name] = self._encode(name, features)
            if features is None or not valid.all():
                every = np.zeros((len(valid), *array.shape[1:]), array.dtype)
                every[valid] = codes.get(name, 0)
                codes[name] = every
        return Encoded(codes=codes, moments={name: moments[name] for name in self._targets})

    @torch.inference_mode()
    def _encode(self, name: str, features: Features) -> tuple[Codes, Iterable[Moments]]:
        target = self._targets.get(name)
        values = features.outputs()[name if target is None else target.level]
        if target is not None:
            values = area_average(values, target.grid)
        encode, decode = self._on(name, values.device)
        codes = encode(values)
        found: Codes = codes.cpu().numpy()
        if target is None:
            return found, ()
        if codes.device.type == "cpu":
            with np.errstate(invalid="ignore"):  # sums of infinities, see `are_sound`
                return found, self._moments(name, found, np.ones(len(found), np.bool_))
        return found, token_moments(decode(codes), self._covariance)

    def _on(self, name: str, device: torch.device) -> tuple[Encode, Decode]:
        """Return what encodes and decodes a target on a device."""
        if (name, device) not in self._encoders:
            codec = self._codecs[name]
            self._encoders[name, device] = _encoder(codec, device), decoder(codec, device)
        return self._encoders[name, device]


def _widen(codes: Codes, out: NDArray[np.float32]) -> None:
    """Fill `out` with floats, in a fifth of the time that numpy takes for those of 16 bits."""
    torch.from_numpy(out).copy_(torch.from_numpy(codes))


def are_sound(encoded: Encoded) -> bool:
    """Tell whether codes and their sums show that all features can be stored; else look at these.

    What exceeds 16 bits becomes infinite in them, and so do the sums: that saves `refuse_unstorable`
    from going over every value. Other codecs hide it, and co-moments come too late.
    """
    if any(codes.dtype != np.float16 for codes in encoded.codes.values()):
        return False
    pooled = encoded.codes.get(GLOBAL)
    return (pooled is None or bool(np.isfinite(pooled).all())) and all(
        isinstance(moments, list | tuple)
        and all(np.isfinite(one.mean).all() and np.isfinite(one.m2).all() for one in moments)
        for moments in encoded.moments.values()
    )


def refuse_unstorable(features: Features, spec: TeacherSpec, image_ids: Sequence[str]) -> None:
    """Raise where a value is no number, or more than the float16 that it is stored in can hold.

    Raises:
        NonFiniteFeaturesError: names images and level.
    """
    for level, values in features.outputs().items():
        narrow = spec.codec == "float16" or (level == GLOBAL and spec.codec != "float32")
        axes = tuple(range(1, values.ndim))
        # Not aminmax, which goes over the same numbers value by value on a processor.
        largest = torch.maximum(values.amax(axes), -values.amin(axes))  # NaN spreads
        where = f"teacher {spec.name!r}, {level}:"
        if bad := _marked(~torch.isfinite(largest), image_ids):
            raise NonFiniteFeaturesError(
                f"{where} NaN or infinity for {bad}. fp16 overflows where bf16 and fp32 do not; "
                "else check the weights."
            )
        if narrow and (bad := _marked(largest > FLOAT16_MAX, image_ids)):
            raise NonFiniteFeaturesError(
                f"{where} values up to {float(largest.max()):.3g} for {bad}, float16 ends at "
                f"{FLOAT16_MAX:.0f}. Give the teacher codec: int8 or float32, or leave the level "
                "out."
            )


def _marked(marks: Tensor, image_ids: Sequence[str]) -> str:
    names = [name for name, mark in zip(image_ids, marks.tolist(), strict=True) if mark]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _encoder(codec: Codec, device: torch.device) -> Encode:
    if isinstance(codec, FloatCodec):
        dtype = _DTYPES[codec.dtype]
        return lambda values: values.to(dtype)
    if isinstance(codec, Int8Codec):
        return _Int8Encoder(codec, device)
    return _BitEncoder(codec, device)


class _Int8Encoder:
    """`Int8Codec.encode` of a batch."""

    def __init__(self, codec: Int8Codec, device: torch.device) -> None:
        self._scale = torch.from_numpy(codec.scale).to(device)
        self._offset = torch.from_numpy(codec.offset).to(device)
        self._axes = None if codec.rotation is None else torch.from_numpy(codec.axes).to(device)

    def __call__(self, values: Tensor) -> Tensor:
        if self._axes is not None:
            return self._square_roots((values - self._offset) @ self._axes.T, None)
        return self._square_roots(values, self._offset)

    def _square_roots(self, components: Tensor, offset: Tensor | None) -> Tensor:
        """B h w K -> codes; rows of the grid, some at a time so that they stay in cache."""
        batch, height, width, kept = components.shape
        flat = components.reshape(batch * height, width * kept)
        scale = self._scale.repeat(width)
        offsets = torch.zeros_like(scale) if offset is None else offset.repeat(width)
        codes = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)
        step = len(flat) if flat.is_cuda else max(1, _CACHED_VALUES // (width * kept))
        for start in range(0, len(flat), step):
            part = flat[start : start + step] - offsets
            roots = part.abs().div_(scale).sqrt_().clamp_(max=127)
            codes[start : start + step] = roots.copysign_(part).round_()
        return codes.view(components.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Components:
    """Components with equally many steps; `edges` (K, E) lie between these."""

    axes: Tensor
    edges: Tensor
    byte: Tensor
    shift: Tensor

    def steps(self, blocks: Tensor) -> Tensor:
        """Return K N uint8 from N D blocks: which step each component of each block is on."""
        components = self.axes @ blocks.T
        if self.edges.shape[1] > _FEW_EDGES or components.is_cuda:
            return torch.searchsorted(self.edges, components, out_int32=True).to(torch.uint8)
        steps = torch.empty(components.shape, dtype=torch.uint8)
        rows = max(1, _CACHED_VALUES // components.shape[1])
        for start in range(0, len(components), rows):
            part = components[start : start + rows]
            count = torch.zeros(part.shape, dtype=torch.uint8)
            for edge in self.edges[start : start + rows].T[..., None]:
                count += part > edge
            steps[start : start + rows] = count
        return steps


class _BitEncoder:
    """`BitCodec.encode` of a batch."""

    def __init__(self, codec: BitCodec, device: torch.device) -> None:
        self._codec = codec
        self._mean = torch.from_numpy(codec.mean).to(device)
        self._groups = []
        for mask in np.unique(codec.mask):
            (places,) = np.nonzero(codec.mask == mask)
            fields = {
                "axes": codec.axes[places],
                "edges": np.stack([codec.edges[place] for place in places]),
                "byte": codec.byte[places],
                "shift": codec.shift[places][:, None],
            }
            tensors = {name: torch.from_numpy(value).to(device) for name, value in fields.items()}
            self._groups.append(_Components(**tensors))

    def __call__(self, values: Tensor) -> Tensor:
        batch, height, width, channels = values.shape
        norms = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        blocks = self._to_blocks(values / norms.clamp(min=1e-12).sqrt()) - self._mean
        shape = self._codec.stored_shape((height, width, channels))
        codes = torch.zeros((shape[-1], len(blocks)), dtype=torch.uint8, device=values.device)
        for group in self._groups:
            codes.index_add_(0, group.byte, group.steps(blocks) << group.shift)
        return codes.T.reshape(batch, *shape)

    def _to_blocks(self, tokens: Tensor) -> Tensor:
        """B H W C -> all blocks of all images, each edge * edge * C."""
        batch, height, width, channels = tokens.shape
        edge = int(self._codec.block)
        tiles = tokens.reshape(batch, height // edge, edge, width // edge, edge, channels)
        return tiles.transpose(2, 3).reshape(-1, edge * edge * channels)
