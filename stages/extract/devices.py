"""What depends on the device that a teacher computes on: threads, pinned batches, its own clock.

A machine with a GPU may well run a teacher on its processor, or on its second GPU; so the teacher
is asked, never the machine.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.extract.clock import StageClock
from stages.extract.teachers import Features, Teacher

Timed = tuple[torch.cuda.Event, torch.cuda.Event]


def device_of(teacher: Teacher) -> torch.device:
    """Return the device a teacher computes on; the processor where it does not say."""
    device: torch.device = getattr(teacher, "device", torch.device("cpu"))
    return device


@dataclass(frozen=True, slots=True, kw_only=True)
class Computing:
    """How batches are computed on a device: forward threads, pinned memory, CUDA's own clock."""

    streams: int
    pinned: bool
    events: bool


def computing(device: torch.device, *, reentrant: bool, threads: int) -> Computing:
    """Return how to compute on a device, with so many threads of torch on the processor.

    Two streams on a processor, each on half of its cores: when decoding or writing takes a core
    away, one waits for it and the other does not. One for a GPU, and for teachers that are not
    `reentrant`. A CUDA device answers before it is done, and copies pinned memory meanwhile.
    """
    cuda = device.type == "cuda"
    several = reentrant and device.type == "cpu" and threads > 1
    return Computing(streams=2 if several else 1, pinned=cuda, events=cuda)


def computing_of(teacher: Teacher) -> Computing:
    """Return how to compute with a teacher on this machine."""
    reentrant = bool(getattr(teacher, "reentrant", False))
    return computing(device_of(teacher), reentrant=reentrant, threads=torch.get_num_threads())


def streams_of(teachers: Iterable[Teacher]) -> int:
    """Return how many batches of these teachers to compute side by side."""
    return min(computing_of(teacher).streams for teacher in teachers)


def on_gpu(teachers: Iterable[Teacher]) -> bool:
    """Tell whether some teacher computes on another device than the processor."""
    return any(device_of(teacher).type != "cpu" for teacher in teachers)


def pinned_for(teacher: Teacher, images: Tensor) -> Tensor:
    """Return the batch in pinned memory where the teacher's device copies from there."""
    if not computing_of(teacher).pinned:
        return images
    with torch.cuda.device(device_of(teacher)):  # else the first GPU is woken up too
        return images.pin_memory()


def answer(teacher: Teacher, images: Tensor, clock: StageClock) -> tuple[Features, Timed | None]:
    """Ask a teacher and count the time as `forward`; with events, `wait_for` counts it."""
    device = device_of(teacher)
    if computing_of(teacher).events:
        return _with_events(teacher, device, images)
    with clock.stage("forward"):
        features = teacher(images)
        if device.type == "mps":
            torch.mps.synchronize()
    return features, None


def wait_for(events: Timed | None, clock: StageClock) -> None:
    """Wait until a CUDA device has answered, and count what it took by its own clock."""
    if events is not None:
        events[1].synchronize()
        clock.add("forward", events[0].elapsed_time(events[1]) / 1000)


def _with_events(teacher: Teacher, device: torch.device, images: Tensor) -> tuple[Features, Timed]:
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device)
        events = _event(), _event()
        events[0].record(stream)
        features = teacher(images)
        events[1].record(stream)
    return features, events


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
