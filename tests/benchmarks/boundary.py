"""BSDS500: people against each other, a Sobel filter, and matching at minimum cost.

    PYTHONPATH=. python tests/benchmarks/boundary.py people --images 200
    PYTHONPATH=. python tests/benchmarks/boundary.py sobel --images 200
    PYTHONPATH=. python tests/benchmarks/boundary.py exact --images 10

Needs ../shared/data/bsds500. `people` scores each annotator against the others of the image; `exact`
compares the F-measures of `match` and of `match_exactly`, the definition of BSDS, on the middles of
Sobel maps.
"""

import argparse
import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from scipy.ndimage import sobel

from stages.evaluate.boundary import (
    BSDS_DISTANCE,
    boundary_scores,
    count_image,
    count_matches,
)
from stages.evaluate.boundary_maps import THRESHOLDS, boundary_pixels, suppress
from stages.evaluate.boundary_match import match, match_exactly, near_pairs

ROOT = Path("../shared/data/bsds500")
CROP = 120
"""Pixels of the squares that `exact` looks at, with the distance of the whole image."""


def main() -> None:
    """Run one comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["people", "sobel", "exact"])
    parser.add_argument("--images", type=int, default=200, help="val first, then train")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    work = {"people": people, "sobel": partial(filtered, exact=False), "exact": partial(filtered, exact=True)}[chosen.what]  # fmt: skip
    started = time.perf_counter()
    with ProcessPoolExecutor(chosen.workers) as pool:
        results = list(pool.map(work, images()[: chosen.images], chunksize=1))
    seconds = time.perf_counter() - started
    if chosen.what == "exact":
        show("match", [first for first, _ in results], None)
        show("match_exactly", [second for _, second in results], None)
    else:
        show(chosen.what, results, seconds)


def images() -> list[Path]:
    """Return the images with annotations, in the order in which they are taken."""
    found = [
        (split, path) for split in ("val", "train") for path in sorted((ROOT / "groundTruth" / split).glob("*.mat"))
    ]  # fmt: skip
    return [path for _, path in found]


def annotations(path: Path) -> list[np.ndarray]:
    """Return each person's boundaries."""
    entries = loadmat(path)["groundTruth"][0]
    return [entry["Boundaries"][0, 0].astype(bool) for entry in entries]


def people(path: Path) -> np.ndarray:
    """Count each person's boundaries against the others': one threshold, repeated."""
    persons = annotations(path)
    counts = [
        count_matches(one, [*persons[:number], *persons[number + 1 :]])
        for number, one in enumerate(persons)
    ]
    return np.tile(np.sum(counts, axis=0), (len(THRESHOLDS), 1))


def filtered(path: Path, exact: bool) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Count a Sobel filter's boundaries, matched both ways if asked."""
    probability, labels = strength(path), annotations(path)
    if not exact:
        return count_image(probability, labels)
    middle = tuple(
        slice(side // 2 - CROP // 2, side // 2 + CROP // 2) for side in probability.shape
    )
    probability, labels = probability[middle], [label[middle] for label in labels]
    distance = BSDS_DISTANCE * math.hypot(321, 481) / math.hypot(CROP, CROP)
    return count_image(probability, labels, distance), exactly(probability, labels, distance)


def strength(path: Path) -> np.ndarray:
    """Return the Sobel gradient of the grey image, the strongest 255."""
    picture = next((ROOT / "images").rglob(f"{path.stem}.jpg"))
    grey = np.asarray(Image.open(picture).convert("L"), np.float32)
    gradient = np.hypot(sobel(grey, 0), sobel(grey, 1))
    return (255 * gradient / gradient.max()).astype(np.uint8)


def exactly(probability: np.ndarray, labels: list[np.ndarray], distance: float) -> np.ndarray:
    """Count at every ninth threshold at minimum cost; the thresholds between repeat it."""
    suppressed = suppress(probability)
    reach = distance * math.hypot(*suppressed.shape)
    rows = []
    for threshold in THRESHOLDS[::9]:
        points = np.argwhere(boundary_pixels(suppressed, float(threshold)))
        right, found = np.zeros(len(points), bool), 0
        for label in labels:
            pairs = near_pairs(points, np.argwhere(label), reach)
            matched = match_exactly(pairs, reach)
            assert matched.sum() == match(pairs).sum()
            right |= matched
            found += int(matched.sum())
        rows += [(right.sum(), len(points), found, sum(int(one.sum()) for one in labels))] * 9
    return np.array(rows)


def show(name: str, counts: Iterable[np.ndarray], seconds: float | None) -> None:
    """Print one line; `exact` compares at every ninth threshold."""
    taken = list(counts)
    if name in ("match", "match_exactly"):
        taken = [np.repeat(image[::9], 9, axis=0) for image in taken]
    found = boundary_scores(taken)
    took = "" if seconds is None else f" {seconds:.1f} s"
    print(f"| {name} | {len(taken)} | {found.ods:.4f} | {found.ois:.4f} | {found.ap:.4f} |{took}")


if __name__ == "__main__":
    main()
