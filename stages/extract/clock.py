"""How long each stage of extraction was at work, and which of them held the others up."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

READING = ("read", "decode", "preprocess")
"""Stages that the same threads do, as many as the machine has cores; each other stage has one."""
_READERS = "readers"
WAITING = ("wait for images", "wait for writing")
"""What the forward stage does when it has nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Where the time of a pass over the images went, or of all workers' shares of it.

    `seconds` and `cpu_seconds` are sums over the threads of a stage, the latter without what
    libraries do in threads of their own; `busy` is what each of a stage's threads was at work for,
    on average, where read, decode and preprocess count as one, `readers`. `elapsed` is
    the pass itself, of workers the sum of what each was at units. `forward_share` is the part of it
    in which a teacher was at work, and so the share of pure forward speed that was reached, where
    nothing else competes for the device; `bottleneck` is the stage that was busiest; `gpu_hours` is
    None on a processor.
    """

    elapsed: float
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    busy: dict[str, float]
    forward_share: float
    bottleneck: str
    gpu_hours: float | None


@dataclass(slots=True)
class StageClock:
    """Adds up the time of stages; all threads of a pass use the same one.

    `streams` is how many threads compute, `readers` how many fetch images; `threads` decode.
    """

    streams: int = 1
    readers: int = field(default_factory=lambda: threads())
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)
    _images: dict[str, int] = field(default_factory=dict)
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

    def done(self, teacher: str, images: int) -> str:
        """Count images that a teacher is done with; return a line on the pass so far."""
        with self._lock:
            self._images[teacher] = self._images.get(teacher, 0) + images
            seen = max(self._images.values())
        return live_note(self.times(time.perf_counter() - self._started, on_gpu=False), seen)

    def times(self, elapsed: float, *, on_gpu: bool) -> StageTimes:
        """Return what a pass of so many seconds was spent on."""
        with self._lock:
            seconds, cpu_seconds = dict(self.seconds), dict(self.cpu_seconds)
        busy = _busy(seconds, self.streams, self.readers)
        return StageTimes(
            elapsed=elapsed,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            busy=busy,
            forward_share=busy.get("forward", 0.0) / elapsed,
            bottleneck=_busiest(busy, seconds),
            gpu_hours=elapsed / 3600 if on_gpu else None,
        )


def total(parts: Sequence[StageTimes]) -> StageTimes | None:
    """Return the sums over units of work, whoever did them; None of nothing."""
    if not parts:
        return None
    elapsed = sum(one.elapsed for one in parts)
    gpu = [one.gpu_hours for one in parts if one.gpu_hours is not None]
    busy = _sums(one.busy for one in parts)
    seconds = _sums(one.seconds for one in parts)
    return StageTimes(
        elapsed=elapsed,
        seconds=seconds,
        cpu_seconds=_sums(one.cpu_seconds for one in parts),
        busy=busy,
        forward_share=busy.get("forward", 0.0) / elapsed if elapsed else 0.0,
        bottleneck=_busiest(busy, seconds),
        gpu_hours=sum(gpu) if gpu else None,
    )


def live_note(times: StageTimes, images: int) -> str:
    """Return what to show while a pass runs: its speed, and what holds it up."""
    rate = images / times.elapsed if times.elapsed else 0.0
    return f"{rate:.1f} images/s, {times.bottleneck} is the bottleneck"


def _sums(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for name, seconds in part.items():
            sums[name] = sums.get(name, 0.0) + seconds
    return sums


def _busy(seconds: Mapping[str, float], streams: int, readers: int) -> dict[str, float]:
    """Return the seconds per thread of each stage, waiting left out, reading as one stage."""
    busy = {name: value for name, value in seconds.items() if name not in WAITING}
    if "forward" in busy:
        busy["forward"] /= streams
    if reading := {name: busy.pop(name) for name in READING if name in busy}:
        fetching = reading.pop("read", 0.0) / readers
        busy[_READERS] = fetching + sum(reading.values()) / threads()
    return busy


def _busiest(busy: Mapping[str, float], seconds: Mapping[str, float]) -> str:
    """Return the busiest stage; of those that share threads the longest."""
    name = max(busy, key=lambda one: busy[one], default="none")
    return max(READING, key=lambda one: seconds.get(one, 0.0)) if name == _READERS else name


def threads() -> int:
    """Return how many threads decode images."""
    return os.cpu_count() or 1
