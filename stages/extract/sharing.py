"""Which shards a process computes when others may be at work on the same store.

Nobody hands them out: whoever comes first claims a shard in the store, and looks again when it has
nothing left to claim, for another may have died over what it had begun.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence

from stages.progress import Progress
from stages.stopping import Stop
from store.writer import FeatureWriter

WriteShards = Callable[[Sequence[Iterator[range]]], None]
"""Computes and writes these shards of each writer, in this order; may draw a little ahead."""


def write_missing(
    writers: Sequence[FeatureWriter], write: WriteShards, progress: Progress, stop: Stop
) -> list[list[range]]:
    """Go on until every shard of every writer is committed; return the own ones of each.

    Raises:
        Terminated: a stop was asked for, and the shards that were begun are committed.
    """
    done: list[list[range]] = [[] for _ in writers]
    missing = [writer.missing() for writer in writers]
    while any(missing):
        mine: list[list[range]] = [[] for _ in writers]
        with stop.deferred():
            write(
                [
                    _claimed(writer, left, own, stop)
                    for writer, left, own in zip(writers, missing, mine, strict=True)
                ]
            )
        left = [writer.missing() for writer in writers]
        for number, own in enumerate(mine):
            done[number] += own
            before, after = missing[number], left[number]
            others = [rows for rows in before if rows not in own and rows not in after]
            progress.advance(sum(map(len, others)))
        if any(left) and not any(mine):
            time.sleep(random.uniform(0.2, 0.6))  # others are at all that is left
        missing = left
    return done


def _claimed(
    writer: FeatureWriter, missing: Sequence[range], mine: list[range], stop: Stop
) -> Iterator[range]:
    for rows in missing:
        if stop.requested:
            return
        if writer.claim(rows):
            mine.append(rows)
            yield rows
