"""Fewer images at a time where work on a batch does not fit into memory."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from stages.extract.errors import BatchTooLargeError
from stages.memory import is_out_of_memory

Part = TypeVar("Part")

_REASON_LENGTH = 200
_logger = logging.getLogger(__name__)


class Halving:
    """Does work on a batch in smaller portions once memory ran out, and from then on.

    `what` is at work, such as `teacher 'sam'`. Not to be shared between threads.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._most: int | None = None
        self._reason = ""

    def __call__(self, count: int, work: Callable[[slice], Part]) -> list[Part]:
        """Return what `work` gives for consecutive portions of `count` images.

        Raises:
            BatchTooLargeError: not even one image fits.
        """
        parts: list[Part] = []
        start = 0
        while start < count:
            stop = min(start + (self._most or count), count)
            done = self._attempt(work, slice(start, stop))
            if done:
                parts += done
                start = stop
            else:  # only here, where the failed call holds no memory any more
                self._halve(stop - start)
        return parts

    def _attempt(self, work: Callable[[slice], Part], portion: slice) -> list[Part]:
        try:
            return [work(portion)]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._reason = memory_reason(error)
        return []

    def _halve(self, tried: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if tried == 1:
            raise BatchTooLargeError(
                f"{self._what} runs out of memory with a single image ({self._reason}); choose a "
                "smaller `input_size:` or `precision: bf16`, another device, or free its memory"
            )
        self._most = tried // 2
        _logger.warning(
            "%s: out of memory with %d images at once, going on with %d; "
            "set `extract: {batch_size: %d}` to begin with that",
            self._what, tried, self._most, self._most,
        )  # fmt: skip


@contextmanager
def named_out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Say which work ran out of memory where it cannot be done in smaller portions.

    Raises:
        BatchTooLargeError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise BatchTooLargeError(
            f"{what} ran out of memory ({memory_reason(error)}); {advice}. What is written is "
            "safe: run the same command again, it resumes"
        ) from error


def memory_reason(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__
