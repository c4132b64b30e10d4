"""Runs a teacher over a few images so that a codec can be fitted to its features.

The images are those whose ids hash lowest: the same ones whatever their order, and spread over
the whole set. Every fifth one only serves to measure what the codec loses.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from stages.extract.reading import RowReader, read_ahead
from stages.progress import Progress
from store.calibration import Calibration
from store.errors import StoreError

_HELD_OUT = 5


def choose_rows(rows: RowReader, count: int) -> tuple[int, ...]:
    """Return at most `count` rows of readable images.

    Raises:
        StoreError: fewer than two images are readable.
    """
    good = [row for row in range(len(rows.views)) if rows.is_ok(row)]
    if len(good) < 2:
        raise StoreError(
            f"a codec is fitted to some images and measured on others, at least 2; {len(good)} of "
            f"the store's {len(rows.images)} images are readable. Use codec: float16"
        )
    chosen = sorted(good, key=lambda row: sampling_order(rows.image_id(row), row))
    return tuple(chosen[:count])


def gather(
    rows: RowReader, chosen: Sequence[int], batch_size: int, progress: Progress
) -> Calibration:
    """Return the tokens that the teacher gives for the chosen rows."""
    calibration = Calibration(rows.teacher.spec, len(chosen))
    progress.start(f"calibrate {rows.teacher.spec.name}", len(chosen))
    position = 0
    with closing(read_ahead(rows.load, chosen, rows.readers, 2 * batch_size)) as inputs:
        for batch in batches(inputs, batch_size):
            features = rows.teacher(batch)
            levels = {name: values.cpu().numpy() for name, values in features.levels.items()}
            for index in range(len(batch)):
                row = {name: values[index] for name, values in levels.items()}
                calibration.add(row, held_out=is_held_out(position))
                position += 1
            progress.advance(len(batch))
    return calibration


def is_held_out(position: int) -> bool:
    """Tell whether a sampled row is measured on; the second one is, so that two images suffice."""
    return position % _HELD_OUT == 1


def batches(inputs: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Stack tensors, `size` at a time; the last batch may be smaller."""
    batch: list[Tensor] = []
    for image in inputs:
        batch.append(image)
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def sampling_order(image_id: str, row: int) -> bytes:
    """Return what rows are sorted by before the first ones are taken as a sample."""
    return hashlib.sha256(f"{image_id} {row}".encode()).digest()
