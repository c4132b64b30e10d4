"""The training loop: one stream of batches, of which each student takes its own steps."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from stages.progress import Progress
from stages.stopping import Stop, Terminated
from stages.train.distributed import Ranks
from stages.train.guard import NonFiniteLossError
from stages.train.learner import Learner
from stages.train.record import Record
from stages.train.stream import Batch, TargetStream, batches
from stages.train.transfer import on_device

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Pupil:
    """A student that learns, what is written of it, and the error that ended it early."""

    learner: Learner
    record: Record
    error: NonFiniteLossError | None = None

    def at(self, step: int) -> bool:
        """Tell whether `step` (zero-based) is the next one of this student."""
        return self.error is None and self.learner.state.step == step

    def keep(self) -> None:
        """Write a checkpoint of the last finished step."""
        if self.error is None:
            self.learner.undo()
            self.record.save(self.learner.state)


@dataclass(slots=True, kw_only=True)
class Loop:
    """Trains several students from one stream, whose settings are those of the first.

    One whose checkpoint is older than the others' takes its steps before they go on.
    """

    pupils: Sequence[Pupil]
    stream: TargetStream
    ranks: Ranks
    progress: Progress
    stop: Stop

    def execute(self) -> None:
        """Train to the last step, logging and writing checkpoints on the way.

        Whatever stops it, an error or a request, leaves checkpoints of the last finished steps. A
        student whose loss is not finite ends, with `Pupil.error`; the others go on.

        Raises:
            OutOfMemoryError: a step does not fit into memory.
            Terminated: `stop` asked for the end.
        """
        steps = self.pupils[0].learner.phase.steps
        first = min(pupil.learner.state.step for pupil in self.pupils)
        self.progress.start(" ".join(pupil.record.folder.name for pupil in self.pupils), steps)
        self.progress.advance(first)
        source = self._source(first)
        for pupil in self.pupils:
            pupil.record.start()
        for step in range(first, steps):
            self._round(step, source)
            if any(pupil.learner.stopping for pupil in self.pupils):
                self._keep()
                raise Terminated
            if all(pupil.error for pupil in self.pupils):
                return

    def _source(self, first: int) -> Iterator[Batch]:
        learner = self.pupils[0].learner
        loaded = batches(
            self.stream,
            batch_size=learner.phase.batch_size,
            start=first,
            stop=learner.phase.steps,
            workers=learner.phase.workers,
            pin=learner.device.type == "cuda",
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        return on_device(loaded, learner.device)

    def _round(self, step: int, source: Iterator[Batch]) -> None:
        """Let every student whose turn it is take its step on the next batch."""
        with self._kept():
            started = time.perf_counter()
            batch = next(source)
            waited = time.perf_counter() - started
        losses = []
        for pupil in self.pupils:
            if pupil.at(step):
                losses += self._take(pupil, batch, waited)
        self.progress.advance(1, f"loss {' '.join(f'{loss:.4g}' for loss in losses)}")

    def _take(self, pupil: Pupil, batch: Batch, waited: float) -> list[float]:
        """Take one student's step; return its loss, or nothing where that ended it."""
        with self._kept():
            try:
                terms = pupil.learner.compute(batch, pupil.record.folder, self.stop.requested)
            except NonFiniteLossError as error:
                pupil.keep()
                pupil.error = error
                if len(self.pupils) > 1:
                    logger.warning("%s ends: %s", pupil.record.folder.name, error)
                return []
        pupil.learner.update()
        pupil.record.add(pupil.learner.state, terms, waited)
        return [terms["loss"]]

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Whatever goes wrong in here, write checkpoints of the last finished steps."""
        try:
            yield
        except BaseException:
            self._keep()
            raise

    def _keep(self) -> None:
        for pupil in self.pupils:
            pupil.keep()
