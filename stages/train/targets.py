"""What the student is compared with: per teacher the levels, on the device, as floats.

Letters: `B` batch, `b` those of its images that a teacher is asked for, `h w` grid, `C` channels,
`K` stored numbers of a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from stages.decode import Decode, decoder
from stages.train.stream import Batch
from store.codecs import FloatCodec
from store.reader import FeatureStore
from store.spec import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTargets:
    """One teacher's answer to a batch."""

    levels: list[Tensor]
    """Per level `b h w C`, floats, on the device."""
    rows: Tensor | None = None
    """Indices `b` of these images in the batch, int64, on the device; None: all of them, in order.
    """
    weight: float = 1.0
    """What the mean loss over the `b` images is multiplied by, so that sampling is unbiased."""


@runtime_checkable
class TargetSource(Protocol):
    """Gives the targets of a batch that is on the device already."""

    def __call__(self, batch: Batch) -> dict[str, TeacherTargets]:
        """Return the targets per teacher; empty where there is nothing to distil."""
        ...


class CachedTargets:
    """Decodes the codes in `batch.targets` on the device, so that only stored bytes travel.

    `levels` names per teacher the (level, grid) pairs in the order of `Batch.targets`.
    """

    def __init__(
        self,
        store: FeatureStore,
        levels: Mapping[str, Sequence[tuple[str, Grid]]],
        device: torch.device,
    ) -> None:
        self._decoders = {
            name: [_decoder(store, name, level, grid, device) for level, grid in pairs]
            for name, pairs in levels.items()
        }

    def __call__(self, batch: Batch) -> dict[str, TeacherTargets]:
        """Return the targets of a batch on the device of this source."""
        weights = sampling_weights(batch)
        return {
            name: TeacherTargets(
                levels=[
                    decode(codes)
                    for decode, codes in zip(self._decoders[name], levels, strict=True)
                ],
                rows=batch.target_rows[name],
                weight=weights[name],
            )
            for name, levels in batch.targets.items()
        }


def sampling_weights(batch: Batch) -> dict[str, float]:
    """Return per teacher of `batch.target_rows` the weight of its mean loss, see `TeacherTargets`.

    An image asks `k` of `T` teachers, each with probability k / T. The full loss of a teacher is
    the mean over all `B` images; T / k times the sum over the `b` that ask it, over `B`, has that
    expectation (Horvitz and Thompson 1952). `B * k` is the number of all (image, teacher) pairs.
    """
    rows = batch.target_rows
    counts = {name: len(batch.ids) if one is None else len(one) for name, one in rows.items()}
    pairs = sum(counts.values())
    return {name: len(counts) * count / pairs for name, count in counts.items()}


def _decoder(
    store: FeatureStore, teacher: str, level: str, grid: Grid, device: torch.device
) -> Decode:
    fitted = store.codec(teacher, level, grid)
    dtype = store.array(teacher, level, grid).dtype
    return decoder(FloatCodec(dtype=dtype) if fitted is None else fitted.codec, device)
