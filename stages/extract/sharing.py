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

WriteShards = Callable[[Iterator[range]], None]
"""Computes and writes these shards, in this order; may draw a little ahead of what it writes."""


def write_missing(
    writer: FeatureWriter, write: WriteShards, progress: Progress, stop: Stop
) -> list[range]:
    """Go on until every shard is committed, by this process or another; return the own ones.

    Raises:
        Terminated: a stop was asked for, and the shard that was begun is committed.
    """
    done: list[range] = []
    missing = writer.missing()
    while missing:
        mine: list[range] = []
        with stop.deferred():
            write(_claimed(writer, missing, mine, stop))
        done += mine
        left = writer.missing()
        others = [rows for rows in missing if rows not in mine and rows not in left]
        progress.advance(sum(map(len, others)))
        if left and not mine:
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
