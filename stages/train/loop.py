"""The training loop: steps, their record, and checkpoints that lose nothing."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stages.progress import Progress
from stages.stopping import Stop, Terminated
from stages.train.average import start_average
from stages.train.checkpoint import TrainingState
from stages.train.config import PhaseConfig, RuntimeConfig
from stages.train.distributed import ALONE, Ranks
from stages.train.guard import (
    NonFiniteLossError,
    bad_step_message,
    memory_told,
    not_finite,
    save_bad_step,
)
from stages.train.keeping import Checkpoints
from stages.train.log import TrainingLog
from stages.train.schedule import learning_rate
from stages.train.step import GRADIENT_NORM, Step
from stages.train.stream import Batch, TargetStream, batches
from stages.train.student import Student
from stages.train.targets import TargetSource
from stages.train.trainable import choose_trainable, trainable_weights
from stages.train.transfer import on_device


@dataclass(slots=True, kw_only=True)
class Pace:
    """Wall-clock seconds, and how many of them were spent waiting for batches."""

    seconds: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlets:
    """Where a loop tells what it does, and who may tell it to stop."""

    log: TrainingLog
    progress: Progress
    checkpoints: Checkpoints
    stop: Stop = field(default_factory=Stop)


class Loop:
    """Owns what changes while training; everything it needs to go on is in `state`."""

    def __init__(
        self,
        student: Student,
        phase: PhaseConfig,
        runtime: RuntimeConfig,
        task_weights: Mapping[str, float],
        targets: TargetSource,
        ranks: Ranks = ALONE,
    ) -> None:
        self._phase, self._ranks = phase, ranks
        self._device = ranks.device(runtime.device)
        self._share = ranks.share(phase.batch_size, phase.accumulate)
        student = student.to(self._device).train()
        if ranks.world > 1 and self._device.type == "cuda":  # torch has none for processors
            nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        choose_trainable(student, phase)
        self.state = TrainingState(
            student=student,
            optimizer=torch.optim.AdamW(
                trainable_weights(student),
                lr=phase.learning_rate,
                weight_decay=phase.weight_decay,
                fused=True,
            ),
            scaler=torch.amp.GradScaler(self._device.type, enabled=runtime.precision == "fp16"),
            step=0,
            window={},
            average=start_average(student, phase.ema_decay),
        )
        self._buffers_before: list[Tensor] = []
        self._saved_step, self._stopping = 0, False
        self._step = Step(student, phase, runtime, task_weights, targets, self._device, ranks)

    def execute(self, stream: TargetStream, outlets: Outlets) -> Pace:
        """Train from the state's step to the last, logging and writing checkpoints on the way.

        Whatever stops it, an error or a request, leaves a checkpoint of the last finished step.

        Raises:
            NonFiniteLossError: before the weights of that step are touched.
            OutOfMemoryError: a step does not fit into memory.
            Terminated: `outlets.stop` asked for the end.
        """
        state, whole, window = self.state, Pace(), Pace()
        outlets.progress.start(outlets.checkpoints.folder.name, self._phase.steps)
        outlets.progress.advance(state.step)
        loaded = batches(
            stream,
            batch_size=self._phase.batch_size,
            start=state.step,
            stop=self._phase.steps,
            workers=self._phase.workers,
            pin=self._device.type == "cuda",
            rank=self._ranks.rank,
            world=self._ranks.world,
        )
        source = on_device(loaded, self._device)
        started = time.perf_counter()
        while state.step < self._phase.steps:
            with self._kept(outlets):
                batch = next(source)
                waited = time.perf_counter() - started
                terms = self._compute(batch, outlets)
            self._update()
            elapsed = time.perf_counter() - started
            started += elapsed
            for pace in (whole, window):
                pace.seconds += elapsed
                pace.waited += waited
            self._record(terms, outlets.log, window)
            if self._due(self._phase.checkpoint_every):
                self._save(outlets)
            outlets.progress.advance(1, f"loss {terms['loss']:.4g}")
            if self._stopping:
                self._save(outlets)
                raise Terminated
        return whole

    def recompute(self, batch: Batch, step: int, rank: int) -> dict[str, float]:
        """Return the terms and the gradient norm of a step (zero-based), and change no weight."""
        terms = self._step.gradient(batch.to(self._device), step, self.state.scaler, rank)
        self.state.scaler.unscale_(self.state.optimizer)
        return _numbers({**terms, GRADIENT_NORM: self._step.gradient_norm()}, ALONE)

    def _compute(self, batch: Batch, outlets: Outlets) -> dict[str, float]:
        """Leave a checked, clipped gradient in the weights; return the step's numbers."""
        state = self.state
        self._buffers_before = [buffer.clone() for buffer in state.student.buffers()]
        images = self._share // self._phase.accumulate
        with memory_told(state.step, images, self._device):
            terms = self._step.gradient(batch, state.step, state.scaler)
        state.scaler.unscale_(state.optimizer)
        norm = self._step.gradient_norm()
        stop = torch.tensor(float(outlets.stop.requested), device=self._device)
        values = _numbers({**terms, GRADIENT_NORM: norm, "stop": stop}, self._ranks)
        # the same answer in every process, so that all stop after the same step
        self._stopping = values.pop("stop") > 0
        self._refuse_not_finite(values, batch, outlets)
        self._step.clip(norm)
        return values

    def _refuse_not_finite(
        self, values: Mapping[str, float], batch: Batch, outlets: Outlets
    ) -> None:
        scaler = self.state.scaler
        names = not_finite(values)
        if names == [GRADIENT_NORM] and scaler.is_enabled() and scaler.get_scale() > 1:
            return  # fp16 overflowed: the scaler skips this step and takes a smaller factor
        if names:
            state = self.state
            self._restore_buffers()
            path = save_bad_step(
                outlets.checkpoints.folder, batch, state.student, state.step, self._ranks
            )
            raise NonFiniteLossError(bad_step_message(state.step, names, batch, path))

    def _update(self) -> None:
        """Change the weights and what follows from them; from here to the end no step fails."""
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, self._phase)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            state.average.update_parameters(state.student)
        self._buffers_before = []
        state.step += 1

    @contextmanager
    def _kept(self, outlets: Outlets) -> Iterator[None]:
        """Whatever goes wrong in here, write a checkpoint of the last finished step."""
        try:
            yield
        except BaseException:
            self._restore_buffers()
            if self.state.step > 0:
                self._save(outlets)
            raise

    def _restore_buffers(self) -> None:
        """Undo what a forward pass did to the statistics of batch normalisation."""
        if self._buffers_before:
            for buffer, before in zip(
                self.state.student.buffers(), self._buffers_before, strict=True
            ):
                buffer.copy_(before)

    def _save(self, outlets: Outlets) -> None:
        if self._ranks.first and self._saved_step != self.state.step:
            outlets.checkpoints.save(self.state, outlets.log.last)
            self._saved_step = self.state.step

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self._phase.steps

    def _record(self, terms: Mapping[str, float], log: TrainingLog, pace: Pace) -> None:
        """Add a step to the window, and close the window with a row of the log when it is full."""
        window = self.state.window
        for name, value in {**terms, "steps": 1.0}.items():
            if math.isfinite(value):  # all but the gradient of a step that fp16 skips
                window[name] = window.get(name, 0.0) + value
        if not self._due(self._phase.log_every):
            return
        steps = window.pop("steps")
        row = {"step": float(self.state.step)}
        row["learning_rate"] = learning_rate(self.state.step - 1, self._phase)
        row |= {name: total / steps for name, total in window.items()}
        row["images_per_second"] = self._phase.batch_size * steps / pace.seconds
        row["data_wait"] = pace.waited / pace.seconds
        log.append(row)
        window.clear()
        pace.seconds = pace.waited = 0.0


def _numbers(terms: Mapping[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Bring scalars to Python in one transfer, each the mean over all processes."""
    stacked = torch.stack([term.detach().float() for term in terms.values()])
    return dict(zip(terms, ranks.mean(stacked).tolist(), strict=True))
