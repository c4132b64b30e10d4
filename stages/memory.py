"""How this process keeps its memory, and how libraries say that there is none left."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_NEVER = 2**31 - 1

KEPT = {
    "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
"""What `keep_freed_memory` does, as environment of a process that is still to be started."""


_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    # how cuBLAS and cuDNN say that there is no room for their handles and workspaces
    "CUBLAS_STATUS_ALLOC_FAILED",
    "when calling `cublasCreate(handle)`",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "Unable to find a valid cuDNN algorithm",
)


def keep_freed_memory() -> None:
    """Have the C library hand freed memory out again instead of giving it back to the system.

    Tensors come and go with every layer. glibc gives each large one back, so the next is made of
    fresh pages, which the system has to clear: nearly half the time of a convolutional network on a
    processor (tests/benchmarks/extraction.py). To be called by a program, not by a library, before
    torch is imported: once two threads have allocated, each goes on keeping a heap of its own, which
    gives back what is large (`KEPT` holds for a process from its start). Does nothing on other C
    libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl, macOS
        return
    for option, value in ((_TRIM_THRESHOLD, _NEVER), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
        mallopt(option, value)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of torch or Python says that memory ran out, on any device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
