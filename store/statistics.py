"""Per-channel mean and variance, gathered image by image and merged exactly (Chan et al. 1983)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Population moments of a level over all tokens of all valid rows.

    `mean` and `variance` are (C,) float64, `count` is the number of tokens.
    """

    count: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Count of tokens, mean (C,) and sum of squared deviations `m2` (C,), float64."""

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def empty(cls, channels: int) -> "Moments":
        """Return the moments of no tokens at all."""
        return cls(count=0, mean=np.zeros(channels), m2=np.zeros(channels))

    @classmethod
    def of(cls, values: NDArray[np.float16], scratch: NDArray[np.float64]) -> "Moments":
        """Return the moments of one row (H, W, C), in two passes; overwrites `scratch` (H*W, C)."""
        np.copyto(scratch, values.reshape(scratch.shape))
        mean = scratch.mean(axis=0)
        np.subtract(scratch, mean, out=scratch)
        m2 = np.einsum("lc,lc->c", scratch, scratch)
        return cls(count=len(scratch), mean=mean, m2=m2)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of tokens together (Chan et al. 1983, eq. 2.1)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        share = other.count / count
        return Moments(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta * delta * (self.count * share),
        )

    def statistics(self) -> Statistics:
        """Return mean and population variance."""
        return Statistics(count=self.count, mean=self.mean, variance=self.m2 / self.count)

    def to_record(self) -> NDArray[np.float64]:
        """Return the moments as (3, C): count, mean, M2."""
        return np.stack([np.full_like(self.mean, self.count), self.mean, self.m2])

    @classmethod
    def from_record(cls, record: NDArray[np.float64]) -> "Moments":
        """Return the moments that `to_record` gave."""
        return cls(count=int(record[0, 0]), mean=record[1], m2=record[2])
