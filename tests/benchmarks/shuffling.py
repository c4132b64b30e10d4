"""How random the order of images is, and how much of the store it reads at a time, by window.

    python tests/benchmarks/shuffling.py [--images 100000] [--classes 1000] [--rows 303] [--batch 256]

The worst case: images lie in the store sorted by class, as in a folder per class. Per window (in
shards; the last is a plain permutation):

* classes met in a batch, over those met by a plain permutation (1 is perfect);
* loss of neighbours: the share of images whose neighbour in the store comes in the same batch
  (a plain permutation: about batch / images);
* rank correlation (Spearman) of the place in the store and the place in the epoch, its mean size;
* shards touched by a batch, of one array: what a disk seeks between;
* shards touched by 1,000 images in a row: with the window's size, what memory should hold.

The default of `--rows` is what 256 MiB hold of one level of a ViT-B at 24 x 24 in float16.
"""

import argparse

import numpy as np
from numpy.typing import NDArray

from stages.train.sampling import Shuffle

EPOCHS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=303, help="of a shard")
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    shards = np.arange(arguments.images) // arguments.rows
    count = int(shards.max()) + 1
    print(
        "| window | classes per batch, over a permutation | neighbours together "
        "| rank correlation | shards per batch | per 1,000 images |"
    )
    print("|---|---|---|---|---|---|")
    plain = figures(Shuffle(shards=shards, window=count, seed=0), arguments)
    for window in (1, 4, 16, 64, 256, count):
        found = figures(Shuffle(shards=shards, window=window, seed=0), arguments)
        name = f"{window} (all)" if window == count else str(window)
        print(
            f"| {name} | {found[0]:.1f}, {found[0] / plain[0]:.2f} | {found[1]:.4f} "
            f"| {found[2]:.4f} | {found[3]:.1f} | {found[4]:.1f} |"
        )


def figures(shuffle: Shuffle, arguments: argparse.Namespace) -> NDArray[np.float64]:
    """Return the columns of the table, the mean over some epochs."""
    return np.mean([of_order(shuffle, epoch, arguments) for epoch in range(EPOCHS)], axis=0)


def of_order(shuffle: Shuffle, epoch: int, arguments: argparse.Namespace) -> tuple[float, ...]:
    order = shuffle.order(epoch)
    classes = order * arguments.classes // arguments.images
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    batch_of = place // arguments.batch
    return (
        distinct(classes, arguments.batch),
        float(np.mean(batch_of[1:] == batch_of[:-1])),
        abs(float(np.corrcoef(np.arange(len(order)), place)[0, 1])),
        distinct(shuffle.shards[order], arguments.batch),
        distinct(shuffle.shards[order], 1000),
    )


def distinct(values: NDArray[np.int64], size: int) -> float:
    """Return how many distinct values a run of `size` has, on average."""
    runs = values[: len(values) // size * size].reshape(-1, size)
    return float(np.mean([len(np.unique(run)) for run in runs]))


if __name__ == "__main__":
    main()
