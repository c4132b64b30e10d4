"""How long each stage of extraction was at work, and which of them held the others up."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

READING = ("read", "decode", "preprocess")
"""Stages that as many threads share as the machine has cores; each other stage has one."""
WAITING = ("wait for images", "wait for writing")
"""What the forward stage does when it has nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Where the time of a pass over the images went.

    `seconds` and `cpu_seconds` are sums over the threads of a stage, the latter without what
    libraries do in threads of their own; `elapsed` is the pass itself. `forward_share` is the part
    of it in which a teacher was at work, and so the share of pure forward speed that was reached,
    where nothing else competes for the device; `bottleneck` is the stage that was busiest;
    `gpu_hours` is None on a processor.
    """

    elapsed: float
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    forward_share: float
    bottleneck: str
    gpu_hours: float | None


@dataclass(slots=True)
class StageClock:
    """Adds up the time of stages; all threads of a pass use the same one."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what the calling thread does meanwhile."""
        started, cpu_started = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started, time.thread_time() - cpu_started)

    def add(self, name: str, seconds: float, cpu_seconds: float = 0.0) -> None:
        """Count seconds of a stage."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + cpu_seconds

    def times(self, elapsed: float, *, streams: int = 1, on_gpu: bool) -> StageTimes:
        """Return what a pass of so many seconds was spent on, with so many forward threads."""
        return StageTimes(
            elapsed=elapsed,
            seconds=dict(self.seconds),
            cpu_seconds=dict(self.cpu_seconds),
            forward_share=self.seconds.get("forward", 0.0) / (elapsed * streams),
            bottleneck=self._bottleneck(streams),
            gpu_hours=elapsed / 3600 if on_gpu else None,
        )

    def _bottleneck(self, streams: int) -> str:
        """Return the stage whose threads were busiest, of those that share threads the longest."""
        busy = {name: value for name, value in self.seconds.items() if name not in WAITING}
        if not busy:
            return "none"
        if "forward" in busy:
            busy["forward"] /= streams
        reading = {name: busy.pop(name) for name in READING if name in busy}
        if reading:
            busy[max(reading, key=lambda name: reading[name])] = sum(reading.values()) / threads()
        return max(busy, key=lambda name: busy[name])


def threads() -> int:
    """Return how many threads read images."""
    return os.cpu_count() or 1
