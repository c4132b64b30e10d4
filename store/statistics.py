"""Moments per channel, gathered image by image and merged exactly.

Mean and sums of squares merge as in Chan, Golub and LeVeque 1983, "Algorithms for computing the
sample variance", eq. 2.1; sums of products likewise, as in Pebay 2008, "Formulas for robust,
one-pass parallel computation of covariances and arbitrary-order statistical moments", section 3.1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CACHED_VALUES = 2**16
"""Numbers summed at a time: 256 KiB of float32 fit the caches that every core has."""
_LINE_VALUES = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Population moments of a level over all tokens of all valid rows.

    `mean` and `variance` are (C,) float64, `count` is the number of tokens, `covariance` is (C, C)
    float64 with `variance` as its diagonal, None where the teacher was extracted without.
    """

    count: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    covariance: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Count of tokens, mean (C,) and sum of squared deviations `m2` (C,), float64.

    `comoment` (C, C) is the sum of the outer products of deviations, with `m2` as its diagonal;
    None where no covariance is asked for.
    """

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    comoment: NDArray[np.float64] | None = None

    @classmethod
    def empty(cls, channels: int, covariance: bool = False) -> "Moments":
        """Return the moments of no tokens at all."""
        comoment = np.zeros((channels, channels)) if covariance else None
        return cls(
            count=0, mean=np.zeros(channels), m2=np.zeros(channels), comoment=comoment
        )  # fmt: skip

    @classmethod
    def of(
        cls,
        values: NDArray[np.float32],
        product: NDArray[np.float64] | None = None,
    ) -> "Moments":
        """Return the moments of one row (H, W, C) float32, contiguous; overwrites `values`.

        Sums are of deviations from the mean of the first tokens, in float32 over some hundred
        tokens and in float64 over those: right to about 1e-6 of the variance. With `product`
        (C, C) the co-moments are gathered into it; they are valid until it is used again.
        """
        width, channels = values.shape[1:]
        side = _side_by_side(width, channels)
        lines = values.reshape(-1, side * channels)
        step = max(16, _CACHED_VALUES // lines.shape[1])
        ones = np.ones(step, np.float32)
        head = lines[:step]
        shift = (ones[: len(head)] @ head / len(head)).reshape(side, channels).mean(axis=0)
        shift = shift.astype(np.float32)
        shifts = np.tile(shift, side)
        totals, squares = np.zeros((2, lines.shape[1]))
        for start in range(0, len(lines), step):
            part = lines[start : start + step]
            part -= shifts
            totals += ones[: len(part)] @ part
            squares += np.einsum("lc,lc->c", part, part)
        count = len(lines) * side
        total = totals.reshape(side, channels).sum(axis=0)
        drift = total / count
        m2 = np.maximum(squares.reshape(side, channels).sum(axis=0) - drift * total, 0)
        if product is not None:
            tokens = values.reshape(-1, channels)
            np.copyto(product, tokens.T @ tokens)
            product -= np.outer(drift, total)
            np.fill_diagonal(product, m2)  # the variance is the same bits with and without
        return cls(count=count, mean=shift + drift, m2=m2, comoment=product)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of tokens together; both have co-moments or none."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        share = other.count / count
        weight = self.count * share
        return Moments(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta * delta * weight,
            comoment=self._merge_comoments(other, delta, weight),
        )

    def _merge_comoments(
        self, other: "Moments", delta: NDArray[np.float64], weight: float
    ) -> NDArray[np.float64] | None:
        if self.comoment is None or other.comoment is None:
            assert self.comoment is other.comoment
            return None
        # In place where possible: the page faults of fresh arrays cost more than the sums.
        between = np.outer(delta, delta)
        between *= weight
        merged = self.comoment + other.comoment
        merged += between
        return merged

    def statistics(self) -> Statistics:
        """Return mean, population variance and, where gathered, population covariance."""
        return Statistics(
            count=self.count,
            mean=self.mean,
            variance=self.m2 / self.count,
            covariance=None if self.comoment is None else self.comoment / self.count,
        )

    def to_record(self) -> NDArray[np.float64]:
        """Return the moments as (3, C): count, mean, M2."""
        return np.stack([np.full_like(self.mean, self.count), self.mean, self.m2])

    def to_triangle(self) -> NDArray[np.float64]:
        """Return the lower triangle of the co-moments by rows, (C (C + 1) / 2,)."""
        assert self.comoment is not None
        return self.comoment[np.tril_indices(len(self.mean))]

    @classmethod
    def from_record(
        cls, record: NDArray[np.float64], triangle: NDArray[np.float64] | None = None
    ) -> "Moments":
        """Return the moments that `to_record` and, if gathered, `to_triangle` gave."""
        comoment = None
        if triangle is not None:
            channels = record.shape[1]
            comoment = np.zeros((channels, channels))
            rows, columns = np.tril_indices(channels)
            comoment[rows, columns] = comoment[columns, rows] = triangle
        return cls(count=int(record[0, 0]), mean=record[1], m2=record[2], comoment=comoment)


def _side_by_side(width: int, channels: int) -> int:
    """Return how many tokens to sum as one, so that lines of few channels are not too short."""
    fitting = range(1, max(1, min(width, _LINE_VALUES // channels)) + 1)
    return max(side for side in fitting if width % side == 0)
