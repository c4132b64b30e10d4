"""Work shared between the threads of one process, for what lets go of Python's lock meanwhile."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

_MOST = 4
"""Threads of one read: more than a few cores' copies are limited by the memory they share."""

_Item = TypeVar("_Item")


def usual_threads() -> int:
    """Return how many threads a read takes where nobody says: the cores at hand, four at most.

    One in a process that `multiprocessing` started: its siblings, which load as well, have the
    other cores.
    """
    if multiprocessing.parent_process() is not None:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST, cores or 1)


def each_in_threads(
    function: Callable[[_Item], None], items: Sequence[_Item], threads: int
) -> None:
    """Call `function` with every item, the caller being one of `threads`.

    The threads are kept for later calls; a forked process starts its own. When one call raises,
    those that were begun are waited for, so that nobody writes to the caller's buffers any more.
    """
    shares = [items[first::threads] for first in range(min(threads, len(items)))]

    def work(share: Sequence[_Item]) -> None:
        for item in share:
            function(item)

    others: list[Future[None]] = []
    try:
        if len(shares) > 1:
            pool = _pool(os.getpid(), threads - 1)
            others = [pool.submit(work, share) for share in shares[1:]]
        for share in shares[:1]:
            work(share)
    finally:
        wait(others)
    for other in others:
        other.result()


@lru_cache(maxsize=8)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of a process, which a fork does not take along."""
    return ThreadPoolExecutor(threads, thread_name_prefix="store")
