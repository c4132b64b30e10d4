"""Probes of image classes on frozen features: nearest neighbours and logistic regression.

The neighbours vote as in DINO (Caron et al. 2021, section 4.1: 20 of them by cosine, weights
exp(cosine / 0.07)); the regression is that of CLIP's own example (Radford et al. 2021, L-BFGS,
C = 0.316, 1,000 steps), on standardised features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from stages.evaluate.features import FeatureSource, Key
from stages.evaluate.splits import ClassSplits
from stages.progress import Progress

NEIGHBOURS = 20
TEMPERATURE = 0.07
INVERSE_PENALTY = 0.316
STEPS = 1000

_Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """Share of the validation images whose class is found, in percent."""

    teacher: str
    level: str
    neighbours: float
    linear: float


def class_probe(
    source: FeatureSource, splits: ClassSplits, *, batch_size: int, progress: Progress
) -> tuple[ClassScore, ...]:
    """Score every level of a source, and a teacher's global vector, by both probes.

    All pooled vectors are in memory at once: 4 bytes x images x channels of all levels.
    """
    progress.start("features", len(splits.train) + len(splits.val))
    train, val = (_vectors(source, ids, batch_size, progress) for ids in (splits.train, splits.val))
    answers = [np.array([splits.labels[one] for one in ids]) for ids in (splits.train, splits.val)]
    progress.start("classify", len(train))
    scores = []
    for key in train:
        scores.append(_score(key, train[key], val[key], *answers))
        progress.advance(1, " ".join(key))
    return tuple(scores)


def neighbour_classes(train: _Vectors, classes: NDArray[Any], val: _Vectors) -> NDArray[Any]:
    """Return the class that the nearest training vectors vote for, per validation vector."""
    model = KNeighborsClassifier(
        n_neighbors=min(NEIGHBOURS, len(train)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / TEMPERATURE),
    )
    found: NDArray[Any] = model.fit(train, classes).predict(val)
    return found


def linear_classes(train: _Vectors, classes: NDArray[Any], val: _Vectors) -> NDArray[Any]:
    """Return the most likely class under a logistic regression, per validation vector."""
    scaler = StandardScaler()
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=STEPS)
    model.fit(scaler.fit_transform(train), classes)
    found: NDArray[Any] = model.predict(scaler.transform(val))
    return found


def _score(
    key: Key, train: _Vectors, val: _Vectors, classes: NDArray[Any], expected: NDArray[Any]
) -> ClassScore:
    return ClassScore(
        teacher=key[0],
        level=key[1],
        neighbours=100 * float((neighbour_classes(train, classes, val) == expected).mean()),
        linear=100 * float((linear_classes(train, classes, val) == expected).mean()),
    )


def _vectors(
    source: FeatureSource, ids: Sequence[str], batch_size: int, progress: Progress
) -> dict[Key, _Vectors]:
    """Return all images' vectors (images, channels) per level."""
    found: dict[Key, list[_Vectors]] = {}
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        for key, vectors in source.pooled(chunk).items():
            found.setdefault(key, []).append(vectors.cpu().numpy())
        progress.advance(len(chunk))
    return {key: np.concatenate(parts) for key, parts in found.items()}
