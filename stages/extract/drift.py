"""What low precision costs: a teacher's features against those of the same weights in float32."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stages.extract.calibrate import batches
from stages.extract.equivariance import choose_images
from stages.extract.halving import Halving
from stages.extract.portions import Portions
from stages.extract.reading import RowReader, read_ahead
from stages.progress import Progress
from store.drift import TABLE, LevelDrift, write_drift
from store.remote import StorePath
from store.spec import TeacherSpec

DRIFT_IMAGES = 16
"""Images that drift is measured on, those whose ids hash lowest."""


def keep_drift(store_path: StorePath, rows: RowReader, batch_size: int, progress: Progress) -> None:
    """Measure a teacher of low precision, and write the figures to its folder, unless they are.

    Only the teacher's writer may. Does nothing where no image is readable.

    Raises:
        ImageChangedError: an image is not the file that was indexed.
        BatchTooLargeError: not even one image fits into memory in float32.
    """
    spec, teacher = rows.teacher.spec, rows.teacher
    folder = store_path / spec.name
    if TABLE.exists(folder) or not is_low(spec) or not isinstance(teacher, Portions):
        return
    if chosen := choose_images(rows, DRIFT_IMAGES):
        measured = measure_drift(teacher, rows, chosen, batch_size, progress)
        write_drift(folder, spec, measured, len(chosen))


def is_low(spec: TeacherSpec) -> bool:
    """Tell whether a teacher computes in less than float32."""
    return str(spec.provenance.get("precision", "fp32")) != "fp32"


def measure_drift(
    teacher: Portions,
    rows: RowReader,
    chosen: Sequence[int],
    batch_size: int,
    progress: Progress,
) -> tuple[LevelDrift, ...]:
    """Compare every level on the chosen rows; both run on the teacher's device.

    Raises:
        BatchTooLargeError: not even one image fits into memory.
    """
    exact, spec = teacher.exact(), teacher.spec
    sums = {level.name: _Sums() for level in spec.levels}
    halving = Halving(f"teacher {spec.name!r} beside itself in float32")

    def compare(batch: Tensor) -> None:
        halving(len(batch), lambda part: compare_part(batch[part]))

    def compare_part(batch: Tensor) -> None:
        rough, fine = teacher(batch).levels, exact(batch).levels
        found = {name: _compared(rough[name], fine[name]) for name in sums}
        for name, one in found.items():  # only where memory was enough for all of them
            sums[name].add(one)

    progress.start(f"compare {spec.name} with float32", len(chosen))
    with closing(read_ahead(rows.load, chosen, rows.readers, 2 * batch_size)) as inputs:
        for batch in batches(inputs, batch_size):
            compare(batch)
            progress.advance(len(batch))
    return tuple(seen.result(name) for name, seen in sums.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """Cosines (tokens,) of a level in a batch, and the sums of squares of error and features."""

    cosines: Tensor
    error: float
    whole: float


def _compared(rough: Tensor, fine: Tensor) -> _Compared:
    """Compare features B h w C of a batch."""
    return _Compared(
        cosines=functional.cosine_similarity(rough, fine, dim=-1).flatten().cpu(),
        error=float((rough - fine).double().square().sum()),
        whole=float(fine.double().square().sum()),
    )


class _Sums:
    """Gathers the tokens of one level."""

    def __init__(self) -> None:
        self._cosines: list[Tensor] = []
        self._error = self._whole = 0.0

    def add(self, one: _Compared) -> None:
        """Take a batch."""
        self._cosines.append(one.cosines)
        self._error += one.error
        self._whole += one.whole

    def result(self, level: str) -> LevelDrift:
        """Return the drift over all batches."""
        cosines = torch.cat(self._cosines).double()
        return LevelDrift(
            level=level,
            tokens=len(cosines),
            cosine_mean=float(cosines.mean()),
            # not torch.quantile, which takes 16 million numbers at most
            cosine_p01=float(cosines.kthvalue(1 + (len(cosines) - 1) // 100).values),
            relative_l2=(self._error / self._whole) ** 0.5 if self._whole else 0.0,
        )
