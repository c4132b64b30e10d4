"""SIGTERM as a request to end well: what is begun is finished, then the run stops, resumable.

Schedulers of clusters and of cheap machines send it some time before they kill.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The run was asked to end by SIGTERM and has stopped at a safe point."""


class Stop:
    """Whether a run was asked to stop; without `deferred` it stops where it is."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def request(self) -> None:
        """Ask for the end; raises `Terminated` unless something has to be finished first."""
        self.requested = True
        if not self._deferred:
            self.check()

    def check(self) -> None:
        """Stop here if asked to.

        Raises:
            Terminated: the end was asked for.
        """
        if self.requested:
            raise Terminated

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the body decide where to stop, by looking at `requested`; stop behind it at last."""
        self.check()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Turn the first SIGTERM into a request; a second one ends the process at once."""
    stop = Stop()

    def ask(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop.request()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
