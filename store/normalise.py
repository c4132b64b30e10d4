"""Normalisations of a level, derived from its statistics without touching its features.

Eigenvectors are unique up to sign (fixed here) and, among equal eigenvalues, up to rotation, which
libraries choose differently in the last bits: keep a map beside whatever was trained with it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError
from store.hadamard import hadamard
from store.statistics import Statistics

EPSILON = 1e-6
"""Least variance that is scaled to 1, in units of the mean variance of a level's channels."""

_CONSTANT = 1e-20  # of the squared mean: float16 cannot vary so little, it is rounding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AffineMap:
    """The invertible map y = (x - mean) @ matrix of tokens x (..., C), in float64.

    `mean` is (C,). `matrix` and its `inverse` are (C, C), or both (C,) where they are diagonal: then
    y = (x - mean) * matrix.
    """

    mean: NDArray[np.float64]
    matrix: NDArray[np.float64]
    inverse: NDArray[np.float64]

    def apply(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the normalised tokens, (..., C) as given."""
        return _times(values - self.mean, self.matrix)

    def invert(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the tokens that `apply` gave `values` for."""
        return _times(values, self.inverse) + self.mean


def z_score(statistics: Statistics, epsilon: float = EPSILON) -> AffineMap:
    """Return the map after which every channel has mean 0 and variance 1; it is diagonal.

    A channel whose variance is below `epsilon` times the mean variance is divided by the root of
    that bound instead: a dead channel stays 0, one that hardly varies is not blown up.

    Raises:
        StoreError: no channel varies.
    """
    deviation = np.sqrt(_bounded(statistics.variance, _mean_variance(statistics), epsilon))
    return AffineMap(mean=statistics.mean, matrix=1 / deviation, inverse=deviation)


def phi_s(statistics: Statistics) -> AffineMap:
    """Return PHI standardisation: a rotation and one scale, after which every variance is 1.

    Ranzinger et al. 2024, "PHI-S: Distribution Balancing for Label-Free Multi-Teacher
    Distillation" (arXiv 2410.01680): with covariance = U diag(v) U^T and H an orthonormal Hadamard
    matrix, y = H U^T (x - mean) / sqrt(mean of v). Distances keep their proportions, and channels
    that are dead or linearly dependent need no epsilon. Where no Hadamard matrix of C channels is
    at hand, H is `equalising_rotation`, which has the property that the paper asks for.

    Raises:
        StoreError: the statistics have no covariance, or no channel varies.
    """
    scale = np.sqrt(_mean_variance(statistics))
    values, vectors = _principal_axes(statistics, "PHI-S")
    flat = hadamard(len(values))
    turn = equalising_rotation(values) if flat is None else flat.T / np.sqrt(len(values))
    rotation = vectors @ turn
    return AffineMap(mean=statistics.mean, matrix=rotation / scale, inverse=rotation.T * scale)


def whitening(statistics: Statistics, epsilon: float = EPSILON) -> AffineMap:
    """Return the symmetric whitening (ZCA): afterwards the covariance is the identity.

    matrix = covariance^(-1/2), of all whitenings the one that moves the data least and the only one
    that is unique (Kessy, Lewin and Strimmer 2018, "Optimal whitening and decorrelation").
    Directions whose variance is below `epsilon` times the mean variance (dead or dependent
    channels, fewer tokens than channels) are divided by the root of that bound instead, so their
    variance stays below 1; without it the noise of float16 would be blown up to it.

    Raises:
        StoreError: the statistics have no covariance, or no channel varies.
    """
    bound = _mean_variance(statistics)
    values, vectors = _principal_axes(statistics, "whitening")
    deviation = np.sqrt(_bounded(values, bound, epsilon))
    return AffineMap(
        mean=statistics.mean,
        matrix=(vectors / deviation) @ vectors.T,
        inverse=(vectors * deviation) @ vectors.T,
    )


def equalising_rotation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return an orthogonal Q (C, C) with every entry on the diagonal of Q^T diag(values) Q equal.

    Schur and Horn proved that there is one; C - 1 rotations of a channel below the mean and one
    above give it, each of which sets one of them to the mean (Bendel and Mickey 1978).
    """
    target = values.mean()
    left = values.copy()
    rotation = np.eye(len(values))
    for _ in range(len(values) - 1):
        low, high = int(np.nanargmin(left)), int(np.nanargmax(left))
        if left[low] >= left[high]:
            break
        sine = np.sqrt(np.clip((target - left[low]) / (left[high] - left[low]), 0, 1))
        cosine = np.sqrt(1 - sine * sine)
        first, second = rotation[:, low].copy(), rotation[:, high].copy()
        rotation[:, low] = cosine * first + sine * second
        rotation[:, high] = cosine * second - sine * first
        left[high] += left[low] - target
        left[low] = np.nan  # done
    return rotation


def _times(values: NDArray[np.floating[Any]], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = values * matrix if matrix.ndim == 1 else values @ matrix
    return product


def _mean_variance(statistics: Statistics) -> float:
    variance = float(statistics.variance.mean())
    if variance <= _CONSTANT * float(np.square(statistics.mean).max()):
        raise StoreError(
            f"none of the {len(statistics.mean)} channels varies over {statistics.count} tokens, "
            "there is nothing to normalise; leave this level out, or check the teacher's weights"
        )
    return variance


def _bounded(
    values: NDArray[np.float64], mean_variance: float, epsilon: float
) -> NDArray[np.float64]:
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon!r}: dead channels need a bound")
    return np.maximum(values, epsilon * mean_variance)


def _principal_axes(
    statistics: Statistics, purpose: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the eigenvalues (C,), largest first and none negative, and the axes as columns."""
    if statistics.covariance is None:
        raise StoreError(
            f"{purpose} needs the covariance of the channels, which this teacher was extracted "
            "without: set `extract.covariance: true` in the parameter file and run "
            "`sak extract-teachers TEACHER --replace`, or use the z-score, which needs none"
        )
    values, vectors = np.linalg.eigh(statistics.covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    return np.maximum(values, 0.0), vectors * np.sign(largest)
