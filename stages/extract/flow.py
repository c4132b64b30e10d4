"""Images flow through teachers into the store, all stages at work side by side.

    read                       threads, an image each; many where images come over a network
    decode, preprocess         the same threads, no more at once than there are cores
    stack                      a thread: images to a batch, pinned for a GPU
    forward                    a thread, two where a processor computes; batches in turn
    encode, write              a thread: codes on the teacher's device, then into the shard

Between any two of them only so much may wait as `_AHEAD` says; memory does not depend on how many
images there are. Several teachers take turns, batch by batch in the order of rows, so that an image
is decoded once for all of them.

Letters: `B` batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import merge

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.extract.clock import StageClock
from stages.extract.devices import Timed, answer, pinned_for, wait_for
from stages.extract.encode import Encoded, Encoder, are_sound, refuse_unstorable
from stages.extract.halving import Halving, named_out_of_memory
from stages.extract.reading import RowReader
from stages.extract.teachers import Features, Teacher
from stages.progress import Progress
from stages.stopping import Stop
from store.writer import FeatureWriter

_AHEAD = 2
"""Batches that wait before a teacher, and before its writer; more before a teacher where as many
reading threads as the clock says would otherwise have nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One batch of a teacher, of one shard."""

    lane: "Lane"
    shard: range
    rows: range


@dataclass(slots=True, kw_only=True, eq=False)
class Lane:
    """One teacher in the flow: where its rows come from and go to."""

    rows: RowReader
    batch_size: int
    writer: FeatureWriter
    encoder: Encoder = field(init=False)
    halving: Halving = field(init=False)
    dropped: set[range] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.halving = Halving(f"encoding for teacher {self.writer.layout.spec.name!r}")
        self.encoder = Encoder(self.writer.layout, self.writer.codecs)

    def steps(self, shards: Iterable[range]) -> Iterator[Step]:
        """Cut shards into batches; batches start where shards start, whoever resumes."""
        for shard in shards:
            for start in range(shard.start, shard.stop, self.batch_size):
                if shard in self.dropped:
                    break
                stop = min(start + self.batch_size, shard.stop)
                yield Step(lane=self, shard=shard, rows=range(start, stop))

    def begins(self, step: Step, stop: Stop) -> bool:
        """Tell whether a step is still to be done: once asked to stop, no shard is begun."""
        if stop.requested and step.rows.start == step.shard.start:
            self.dropped.add(step.shard)
        return step.shard not in self.dropped

    def encode(self, rows: range, answered: "_Answer", part: slice) -> Encoded:
        """Return the codes of `rows`, which are a `part` of those that a teacher answered.

        Raises:
            NonFiniteFeaturesError: see `refuse_unstorable`.
        """
        valid = answered.valid[part]
        if answered.features is None or not valid.any():
            return self.encoder(None, valid)
        start = int(answered.valid[: part.start].sum())
        features = answered.features.part(slice(start, start + int(valid.sum())))
        encoded = self.encoder(features, valid)
        if not are_sound(encoded):
            names = [self.rows.image_id(row) for row in self.good(rows)]
            refuse_unstorable(features, self.rows.teacher.spec, names)
        return encoded

    def good(self, rows: range) -> list[int]:
        """Return the rows whose image can be read."""
        return [row for row in rows if self.rows.is_ok(row)]


def flow(
    steps: Iterator[Step],
    clock: StageClock,
    progress: Progress,
    stop: Stop,
) -> None:
    """Take every step, in order, and write what comes of it; returns when all is written.

    By as many threads as `clock` says. Whatever ends it, what a teacher has answered by then is written first.

    Raises:
        ExtractionError: an image changed or cannot be fetched, or features cannot be stored.
        StoreError: the store cannot be written. Shards that were complete are safe.
    """
    answering: deque[tuple[Step, Future[_Answer]]] = deque()
    writing: deque[Future[None]] = deque()

    def pass_on() -> None:
        """Hand the oldest answer to the writer, as soon as there is room."""
        step, answered = answering.popleft()
        writing.append(writer.submit(_store, step, answered.result(), clock, progress, stop))
        with clock.stage("wait for writing"):
            while len(writing) > _AHEAD:
                writing.popleft().result()

    with (
        ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
        threads_per_stream(clock.streams),
        ThreadPoolExecutor(clock.streams, thread_name_prefix="forward") as forward,
    ):
        try:
            for step, inputs in read_steps(steps, clock):
                if not step.lane.begins(step, stop):
                    inputs.cancel()
                    continue
                with clock.stage("wait for images"):
                    images = inputs.result()
                answering.append((step, forward.submit(_forward, step, images, clock)))
                if len(answering) > clock.streams:
                    pass_on()
        finally:
            while answering:
                pass_on()
        with clock.stage("wait for writing"):
            while writing:
                writing.popleft().result()


@contextmanager
def threads_per_stream(streams: int) -> Iterator[None]:
    """Have each of so many forward threads compute on its share of the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // streams))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turn(lanes: Sequence[tuple[Lane, Iterator[range]]]) -> Iterator[Step]:
    """Return the steps of several teachers' shards, in the order of rows."""
    return merge(*(lane.steps(shards) for lane, shards in lanes), key=lambda step: step.rows.stop)


def read_steps(
    steps: Iterable[Step], clock: StageClock
) -> Iterator[tuple[Step, "Future[Tensor | None]"]]:
    """Yield each step with its stack of inputs (B, ...) to come, None where no image is readable.

    Errors of reading are raised by the futures. What was begun is dropped when the caller stops.
    """
    pending: deque[tuple[Step, Future[Tensor | None]]] = deque()
    with (
        ThreadPoolExecutor(clock.readers, thread_name_prefix="decode") as decode,
        ThreadPoolExecutor(1, thread_name_prefix="stack") as stack,
    ):
        try:
            for step in steps:
                load: Callable[[int], Tensor] = step.lane.rows.load
                images = [decode.submit(load, row) for row in step.lane.good(step.rows)]
                pending.append((step, stack.submit(_stack, images, step.lane.rows.teacher, clock)))
                if len(pending) > max(_AHEAD, clock.readers // step.lane.batch_size):
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            decode.shutdown(wait=False, cancel_futures=True)
            stack.shutdown(wait=False, cancel_futures=True)


def _stack(
    images: Sequence["Future[Tensor]"], teacher: Teacher, clock: StageClock
) -> Tensor | None:
    if not images:
        return None
    what = f"reading {len(images)} images for teacher {teacher.spec.name!r}"
    with named_out_of_memory(what, "choose a smaller `extract: {batch_size: ...}`"):
        inputs = [image.result() for image in images]
        with clock.stage("stack"):
            return pinned_for(teacher, torch.stack(inputs))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a teacher says of the `valid` (n,) rows of a step; a GPU is timed by its own clock."""

    features: Features | None
    valid: NDArray[np.bool_]
    events: Timed | None = None


def _forward(step: Step, images: Tensor | None, clock: StageClock) -> _Answer:
    valid = np.array([step.lane.rows.is_ok(row) for row in step.rows])
    if images is None:
        return _Answer(features=None, valid=valid)
    features, events = answer(step.lane.rows.teacher, images, clock)
    return _Answer(features=features, valid=valid, events=events)


def _store(
    step: Step, answered: _Answer, clock: StageClock, progress: Progress, stop: Stop
) -> None:
    if not step.lane.begins(step, stop):
        return
    try:
        _encode_and_write(step, answered, clock)
    except BaseException:
        step.lane.dropped.add(step.shard)  # its other batches have nowhere to go
        raise
    progress.advance(
        len(step.rows), clock.done(step.lane.rows.teacher.spec.name, int(answered.valid.sum()))
    )


def _encode_and_write(step: Step, answered: _Answer, clock: StageClock) -> None:
    lane = step.lane
    wait_for(answered.events, clock)
    with clock.stage("encode"):
        parts = lane.halving(
            len(step.rows), lambda part: (part, lane.encode(step.rows[part], answered, part))
        )
    with clock.stage("write"):
        for part, encoded in parts:
            lane.writer.write_codes(
                step.rows[part], encoded.codes, encoded.moments, answered.valid[part]
            )
