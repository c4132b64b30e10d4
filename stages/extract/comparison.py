"""How near two sets of features are, and how near they must be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How near two sets of features are: mean cosine over tokens, and relative L2 error."""

    cosine: float
    relative_l2: float


# Measured on 4 real photographs, 2 CPU cores, torch 2.14: rounding to float16 costs a relative L2
# of 2.1e-4 and 1 - cosine 2e-8 on every network tried, and fp32 repeats to the bit in batches of
# any size; the rest of its allowance is for other kernels. Another machine rounds bf16 and fp16
# differently, as far apart as either is from fp32: bf16 up to 1.0e-2 and 5e-5 on trained networks
# (random MobileNetV2 6.7e-2 and 2e-3; ViT-B 6.8e-3, and 4.4e-3 between batches of 1 and 4), fp16 up
# to 9.6e-4 and 5e-7 (random MobileNetV2 9.2e-3 and 4e-5). Networks whose rounding is worse than
# these are reported, and the numbers stand beside the finding.
_ARITHMETIC = {
    "fp32": Fidelity(cosine=0.99999, relative_l2=2e-3),
    "fp16": Fidelity(cosine=0.9999, relative_l2=1e-2),
    "bf16": Fidelity(cosine=0.999, relative_l2=5e-2),
}


# Single rows beside what a codec reports of held-out ones. Measured on trained MobileNetV2 and a
# random ViT, 2 to 4 levels at 2 resolutions each, int8 and pca at 4 and 2 bits, fitted to 12 and
# reported on 12 NYUv2 images, 48 others compared: most rows lose up to 1.6 times the report in
# 1 - cosine (1.4 in relative L2). Rows with values beyond the fitted range lose up to 5.8 times (3.4
# times), but that is at most 6.8e-3 (0.124) where losses are small. The mean over the 48 is up to
# 1.30 times the report (1.23 times).
_OF_ROW, _OF_MEAN = 2.0, 1.25
_CLIPPED = Fidelity(cosine=1 - 5e-3, relative_l2=0.06)


def tolerance(precision: str, codec: Fidelity | None = None, rows: int = 1) -> Fidelity:
    """Return the least cosine and the largest relative L2 at which features still agree.

    Args:
        precision: the teacher's own arithmetic: "fp32", "bf16" or "fp16".
        codec: what a lossy codec reports of itself on held-out rows; None for float types.
        rows: how many rows the errors are of; those of many lie nearer to the codec's report.
    """
    own = _ARITHMETIC[precision]
    if codec is None:
        return own
    # Angles add at most, and so do distances; small angles are sqrt(2 * (1 - cosine)).
    spread = rows**-0.5
    factor = _OF_MEAN + (_OF_ROW - _OF_MEAN) * spread
    loss = factor * (1 - codec.cosine) + spread * (1 - _CLIPPED.cosine)
    distance = factor * codec.relative_l2 + spread * _CLIPPED.relative_l2
    angle = (1 - own.cosine) ** 0.5 + loss**0.5
    return Fidelity(cosine=1 - angle**2, relative_l2=own.relative_l2 + distance)


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelComparison:
    """Stored against fresh features of one level; cosines are over all tokens of sampled rows.

    `relative_l2` is the norm of the difference over the norm of the fresh features. `allowed` is
    for each row, `allowed_together` for all of them, which tells smaller differences.
    """

    teacher: str
    level: str
    rows: int
    cosine_mean: float
    cosine_min: float
    relative_l2: float
    allowed: Fidelity
    allowed_together: Fidelity
    wrong_rows: tuple[int, ...]

    @property
    def wrong_together(self) -> bool:
        """Whether the rows as a whole are further off than allowed."""
        return not (
            self.cosine_mean >= self.allowed_together.cosine
            and self.relative_l2 <= self.allowed_together.relative_l2
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """Errors of one row: `cosines` (tokens,) of a row; squared norms of its difference and of its fresh features."""

    cosines: NDArray[np.float64]
    difference: float
    norm: float

    @property
    def relative_l2(self) -> float:
        """Relative L2 error of the row."""
        return _relative(self.difference, self.norm)


def row_errors(stored: NDArray[Any], fresh: NDArray[Any]) -> list[RowError]:
    """Compare rows (n, ..., C) token by token; two tokens of zeros agree."""
    errors = []
    for one, other in zip(stored, fresh, strict=True):
        a, b = (part.reshape(-1, part.shape[-1]).astype(np.float64) for part in (one, other))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        dots = np.einsum("tc,tc->t", a, b)
        same = (a == b).all(axis=1).astype(np.float64)
        cosines = np.divide(dots, lengths, out=same, where=lengths > 0)
        errors.append(
            RowError(
                cosines=cosines, difference=float(((a - b) ** 2).sum()), norm=float((b**2).sum())
            )
        )
    return errors


def _relative(difference: float, norm: float) -> float:
    return (difference / norm) ** 0.5 if norm else float(difference > 0)


def compare(
    teacher: str,
    level: str,
    entries: Sequence[tuple[int, RowError]],
    precision: str,
    codec: Fidelity | None = None,
) -> LevelComparison:
    """Sum up the errors of rows (row, error) of a target and name those that `tolerance` refuses."""
    allowed = tolerance(precision, codec)
    cosines = np.concatenate([error.cosines for _, error in entries])
    total = sum(error.difference for _, error in entries)
    return LevelComparison(
        teacher=teacher,
        level=level,
        rows=len(entries),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        relative_l2=_relative(total, sum(error.norm for _, error in entries)),
        allowed=allowed,
        allowed_together=tolerance(precision, codec, len(entries)),
        wrong_rows=tuple(
            row
            for row, error in entries
            # Row by row: a mean over many rows would hide the one that shows another image.
            if not (
                error.cosines.mean() >= allowed.cosine and error.relative_l2 <= allowed.relative_l2
            )
        ),
    )
