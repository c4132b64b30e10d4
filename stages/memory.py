"""How this process keeps its memory, which decides how fast networks run on a processor."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have the C library hand freed memory out again instead of giving it back to the system.

    Tensors come and go with every layer. glibc gives each large one back, so the next is made of
    fresh pages, which the system has to clear: nearly half the time of a convolutional network on a
    processor (tests/benchmarks/extraction.py). To be called before tensors are made, by a program,
    not by a library. Does nothing on other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl, macOS
        return
    for option, value in ((_TRIM_THRESHOLD, _NEVER), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
        mallopt(option, value)
