"""Which instances stand out: a deterministic rule on the instance map."""

from collections.abc import Set as AbstractSet

import numpy as np
import numpy.typing as npt

PERSON_SHARE = 0.004
OBJECT_SHARE = 0.01
CLOSE_TO_BEST = 0.6


def salient_instances(
    instances: npt.NDArray[np.int32], people: AbstractSet[int], background: AbstractSet[int]
) -> list[int]:
    """The salient instances of a map H x W of instance numbers.

    Every person who fills at least 0.4 % of the image is salient. Other things score
    `sqrt(area share) * exp(-(d / 0.5)^2)`, with `d` the distance of their visible centroid from
    the image's centre in half diagonals; those with at least 1 % of the image and a score of at
    least 0.6 of the best are salient. Things in `background` never are.
    """
    height, width = instances.shape
    ids, inverse, counts = np.unique(instances, return_inverse=True, return_counts=True)
    flat = inverse.reshape(-1)
    rows, columns = np.indices(instances.shape)
    y = np.bincount(flat, rows.reshape(-1)) / counts - (height - 1) / 2
    x = np.bincount(flat, columns.reshape(-1)) / counts - (width - 1) / 2
    distance = np.hypot(x, y) / np.hypot(height / 2, width / 2)
    share = counts / instances.size
    scores = np.sqrt(share) * np.exp(-((distance / 0.5) ** 2))
    chosen: list[int] = []
    best = 0.0
    for number, score, area in zip(ids.tolist(), scores.tolist(), share.tolist(), strict=True):
        if number in people and area >= PERSON_SHARE:
            chosen.append(number)
        elif number not in people and number not in background and area >= OBJECT_SHARE:
            best = max(best, score)
    for number, score, area in zip(ids.tolist(), scores.tolist(), share.tolist(), strict=True):
        candidate = number not in people and number not in background and area >= OBJECT_SHARE
        if candidate and score >= CLOSE_TO_BEST * best:
            chosen.append(number)
    return sorted(chosen)
