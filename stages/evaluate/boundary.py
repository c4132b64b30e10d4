"""The boundary F-measure of BSDS (Martin, Fowlkes and Malik 2004; Arbelaez et al. 2011, section 3).

ODS: best F of one threshold for the whole set; OIS: each image at its own best; AP: area under the
curve. A predicted pixel is right if it is matched in any annotation; a labelled one is found if it
is matched, counted for each annotation. Letters: H W pixels, T thresholds, A annotations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray

from stages.evaluate.boundary_maps import THRESHOLDS, boundary_pixels, suppress
from stages.evaluate.boundary_match import Pairs, match, near_pairs

BSDS_DISTANCE = 0.0075
"""Largest distance of a match, as a share of the image's diagonal."""
NYUD_DISTANCE = 0.011
_STEPS = 100  # between two thresholds, where the best F is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryScores:
    """F-measures between 0 and 1, and the probability at which the set's F is best."""

    ods: float
    ois: float
    ap: float
    threshold: float


def count_image(
    probability: UInt8[np.ndarray, "H W"],
    annotations: Sequence[Bool[np.ndarray, "H W"]],
    distance: float = BSDS_DISTANCE,
) -> Int[np.ndarray, "T 4"]:
    """Match one image at every threshold.

    `probability` is in 8 bits. Returns per threshold: matched predicted pixels, predicted pixels,
    matched annotated pixels, annotated pixels.
    """
    suppressed = suppress(probability)
    candidates = suppressed >= THRESHOLDS[0]
    pairs = _pairs(candidates, annotations, distance)
    rows = []
    for binary, group in groupby(_thresholded(suppressed), key=lambda kept: kept.tobytes()):
        pixels = np.frombuffer(binary, bool).reshape(suppressed.shape)
        counts = _count([near.of(pixels[candidates]) for near in pairs])
        rows += [counts] * len(list(group))
    return np.array(rows)


def count_matches(
    pixels: Bool[np.ndarray, "H W"],
    annotations: Sequence[Bool[np.ndarray, "H W"]],
    distance: float = BSDS_DISTANCE,
) -> tuple[int, int, int, int]:
    """Match boundary pixels with each annotation; the counts are those of `count_image`."""
    return _count(_pairs(pixels, annotations, distance))


def boundary_scores(images: Sequence[Int[np.ndarray, "T 4"]]) -> BoundaryScores:
    """Pool the counts of a set's images.

    Raises:
        ValueError: there is no image.
    """
    if not len(images):
        raise ValueError("boundary scores need at least one image, got none")
    counts = np.stack(list(images)).astype(np.float64)
    precision, recall = _curve(counts.sum(axis=0))
    ods, threshold = _best(precision, recall)
    at_best = [image[_f(*_curve(image)).argmax()] for image in counts]
    ois = float(_f(*_curve(np.sum(at_best, axis=0)[None]))[0])
    return BoundaryScores(ods=ods, ois=ois, ap=_area(precision, recall), threshold=threshold)


def _pairs(
    pixels: Bool[np.ndarray, "H W"], annotations: Sequence[Bool[np.ndarray, "H W"]], distance: float
) -> list[Pairs]:
    """Return, per annotation, which of its pixels are near which pixels of a map."""
    reach = distance * math.hypot(*pixels.shape)
    points = np.argwhere(pixels)
    return [near_pairs(points, np.argwhere(one), reach) for one in annotations]


def _count(pairs: Sequence[Pairs]) -> tuple[int, int, int, int]:
    """Match the same points with each annotation."""
    matched = [match(near) for near in pairs]
    right = np.logical_or.reduce(matched)
    found = sum(int(one.sum()) for one in matched)
    return int(right.sum()), len(right), found, sum(near.others for near in pairs)


def _thresholded(suppressed: Float[np.ndarray, "H W"]) -> list[NDArray[np.bool_]]:
    """Return the thinned map per threshold; equal maps are thinned once."""
    maps: list[NDArray[np.bool_]] = []
    above = [suppressed >= threshold for threshold in THRESHOLDS]
    for number, threshold in enumerate(THRESHOLDS):
        same = number > 0 and np.array_equal(above[number], above[number - 1])
        maps.append(maps[-1] if same else boundary_pixels(suppressed, float(threshold)))
    return maps


def _curve(counts: Float[np.ndarray, "T 4"]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return precision and recall; nothing over nothing is 0."""
    right, predicted, found, labelled = counts.T
    return right / np.maximum(predicted, 1), found / np.maximum(labelled, 1)


def _f(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> NDArray[np.float64]:
    total = precision + recall
    scores: NDArray[np.float64] = 2 * precision * recall / np.where(total > 0, total, 1)
    return scores


def _best(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> tuple[float, float]:
    """Return the best F and its threshold, on straight lines between neighbouring thresholds."""
    positions = np.arange((len(precision) - 1) * _STEPS + 1) / _STEPS
    at = np.arange(len(precision))
    scores = _f(np.interp(positions, at, precision), np.interp(positions, at, recall))
    best = int(scores.argmax())
    return float(scores[best]), float(np.interp(positions[best], at, THRESHOLDS))


def _area(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> float:
    """Sum precision at recalls 0, 0.01 .. 1; outside the curve it is 0."""
    known, first = np.unique(recall, return_index=True)
    if len(known) < 2:
        return 0.0
    at = np.arange(101) / 100
    return float(np.interp(at, known, precision[first], left=0, right=0).sum() / 100)
