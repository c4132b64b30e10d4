"""What a codec promises: how like the original its tokens stay, by how much smaller it is.

The bars are those that the codecs of this project are tested against: cosine similarity of a
token with what is decoded, mean and 1st percentile, at every level and resolution.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from store.calibration import Fidelity


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """The least cosine, mean and 1st percentile, of codecs up to `ratio` times below float32."""

    ratio: float
    cosine_mean: float
    cosine_p01: float

    def met_by(self, fidelity: Fidelity) -> bool:
        """Return whether a target keeps enough; never where the cosine is not a number."""
        return fidelity.cosine_mean >= self.cosine_mean and fidelity.cosine_p01 >= self.cosine_p01


CONTRACTS = (
    Contract(ratio=4.5, cosine_mean=0.9998, cosine_p01=0.997),
    Contract(ratio=9.0, cosine_mean=0.994, cosine_p01=0.98),
    Contract(ratio=math.inf, cosine_mean=0.94, cosine_p01=-1.0),
)
"""About 4x (int8 and floats), about 8x, about 16x, whose 1st percentile promises nothing."""


def contract_of(ratio: float) -> Contract:
    """Return what a codec `ratio` times smaller than float32 has to keep."""
    return next(contract for contract in CONTRACTS if ratio <= contract.ratio)


def worst(fidelities: Iterable[Fidelity]) -> Fidelity:
    """Return the lowest cosines and the largest error of several targets."""
    every = list(fidelities)
    return Fidelity(
        cosine_mean=_lowest(one.cosine_mean for one in every),
        cosine_p01=_lowest(one.cosine_p01 for one in every),
        relative_l2=-_lowest(-one.relative_l2 for one in every),
    )


def _lowest(values: Iterable[float]) -> float:
    every = list(values)
    return math.nan if any(map(math.isnan, every)) else min(every)
