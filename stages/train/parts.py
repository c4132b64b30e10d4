"""Cutting a batch into parts that are computed one after the other."""

from dataclasses import replace

from torch import Tensor

from stages.train.stream import Batch


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Return `parts` batches of the same size, in order.

    The mean of the parts' losses is the loss of the whole wherever that is a mean over images.
    """
    size = len(batch.ids) // parts
    assert size * parts == len(batch.ids), "the settings make sure of that"
    if parts == 1:
        return [batch]
    return [_part(batch, slice(first, first + size)) for first in range(0, size * parts, size)]


def _part(batch: Batch, images: slice) -> Batch:
    targets: dict[str, list[Tensor]] = {}
    rows: dict[str, Tensor | None] = {}
    for name, levels in batch.targets.items():
        asked = batch.target_rows[name]
        if asked is None:
            targets[name], rows[name] = [level[images] for level in levels], None
        else:
            inside = (asked >= images.start) & (asked < images.stop)
            targets[name] = [level[inside] for level in levels]
            rows[name] = asked[inside] - images.start
    return replace(
        batch,
        ids=batch.ids[images],
        views=batch.views[images],
        images=batch.images[images],
        labels={task: label[images] for task, label in batch.labels.items()},
        targets=targets,
        target_rows=rows,
        parts=None if batch.parts is None else batch.parts[images],
    )
