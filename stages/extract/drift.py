"""What low precision costs: a teacher's features against those of the same weights in float32."""

from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stages.extract.calibrate import batches, choose_rows
from stages.extract.clock import threads
from stages.extract.reading import RowReader, read_ahead
from stages.extract.teachers import NetworkTeacher
from stages.progress import Progress

DRIFT_IMAGES = 16
"""Images that drift is measured on, of those that codecs are fitted to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelDrift:
    """How far a level is from float32 on `tokens` tokens.

    Cosine similarity of a token with its float32 self, mean and 1st percentile; norm of the
    difference of all tokens over the norm of all of them.
    """

    level: str
    tokens: int
    cosine_mean: float
    cosine_p01: float
    relative_l2: float


def measure_drift(
    teacher: NetworkTeacher, rows: RowReader, batch_size: int, progress: Progress
) -> tuple[LevelDrift, ...]:
    """Compare every level on a few calibration images; both run on the teacher's device.

    Raises:
        StoreError: fewer than two images are readable.
    """
    exact = teacher.exact()
    chosen = choose_rows(rows, DRIFT_IMAGES)
    sums = {level.name: _Sums() for level in teacher.spec.levels}
    progress.start(f"compare {teacher.spec.name} with float32", len(chosen))
    with closing(read_ahead(rows.load, chosen, threads(), 2 * batch_size)) as inputs:
        for batch in batches(inputs, batch_size):
            rough, fine = teacher(batch).levels, exact(batch).levels
            for name, seen in sums.items():
                seen.add(rough[name], fine[name])
            progress.advance(len(batch))
    return tuple(seen.result(name) for name, seen in sums.items())


class _Sums:
    """Gathers the tokens of one level."""

    def __init__(self) -> None:
        self._cosines: list[Tensor] = []
        self._error = self._whole = 0.0

    def add(self, rough: Tensor, fine: Tensor) -> None:
        """Take the features B h w C of a batch."""
        self._cosines.append(functional.cosine_similarity(rough, fine, dim=-1).flatten().cpu())
        self._error += float((rough - fine).double().square().sum())
        self._whole += float(fine.double().square().sum())

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
