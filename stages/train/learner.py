"""One student while it learns: its state, and its own step on a batch."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

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
from stages.train.schedule import learning_rate
from stages.train.step import GRADIENT_NORM, Step
from stages.train.stream import Batch
from stages.train.student import Student
from stages.train.targets import TargetSource
from stages.train.trainable import trainable_weights
from stages.train.transfer import of_teachers


class Learner:
    """Owns what changes while a student learns; everything it needs to go on is in `state`.

    `teachers` are those of a batch's that it learns from; None: all of them. Every step sets torch's
    random numbers anew, so that it makes no difference who else learns from the same batches.
    """

    def __init__(
        self,
        student: Student,
        phase: PhaseConfig,
        runtime: RuntimeConfig,
        task_weights: Mapping[str, float],
        targets: TargetSource,
        ranks: Ranks = ALONE,
        teachers: tuple[str, ...] | None = None,
    ) -> None:
        self.phase, self._ranks, self._teachers = phase, ranks, teachers
        self.device = ranks.device(runtime.device)
        self._share = ranks.share(phase.batch_size, phase.accumulate)
        student = student.to(self.device).train()
        if ranks.world > 1 and self.device.type == "cuda":  # torch has none for processors
            nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        self.state = TrainingState(
            student=student,
            optimizer=torch.optim.AdamW(
                trainable_weights(student),
                lr=phase.learning_rate,
                weight_decay=phase.weight_decay,
                fused=True,
            ),
            scaler=torch.amp.GradScaler(self.device.type, enabled=runtime.precision == "fp16"),
            step=0,
            window={},
            average=start_average(student, phase.ema_decay),
        )
        self.stopping = False
        """Whether one of the processes was asked to stop."""
        self._buffers_before: list[Tensor] = []
        self._step = Step(student, phase, runtime, task_weights, targets, self.device, ranks)

    def compute(self, batch: Batch, folder: Path, stop: bool) -> dict[str, float]:
        """Leave a checked, clipped gradient in the weights; return the step's numbers.

        `stopping` then tells whether a process was asked to `stop`: all hear of it at the same step.

        Raises:
            NonFiniteLossError: the batch is in `folder`, no weight was touched.
            OutOfMemoryError: the step does not fit into memory.
        """
        state = self.state
        batch = batch if self._teachers is None else of_teachers(batch, self._teachers)
        self._buffers_before = [buffer.clone() for buffer in state.student.buffers()]
        with memory_told(state.step, self._share // self.phase.accumulate, self.device):
            terms = self._step.gradient(batch, state.step, state.scaler)
        state.scaler.unscale_(state.optimizer)
        norm = self._step.gradient_norm()
        asked = torch.tensor(float(stop), device=self.device)
        values = _numbers({**terms, GRADIENT_NORM: norm, "stop": asked}, self._ranks)
        self.stopping = values.pop("stop") > 0
        self._refuse_not_finite(values, batch, folder)
        self._step.clip(norm)
        return values

    def update(self) -> None:
        """Change the weights and what follows from them; from here to the end no step fails."""
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, self.phase)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            state.average.update_parameters(state.student)
        self._buffers_before = []
        state.step += 1

    def undo(self) -> None:
        """Undo what a forward pass did to the statistics of batch normalisation."""
        if self._buffers_before:
            buffers = self.state.student.buffers()
            for buffer, before in zip(buffers, self._buffers_before, strict=True):
                buffer.copy_(before)

    def recompute(self, batch: Batch, step: int, rank: int) -> dict[str, float]:
        """Return the terms and the gradient norm of a step (zero-based), and change no weight."""
        terms = self._step.gradient(batch.to(self.device), step, self.state.scaler, rank)
        self.state.scaler.unscale_(self.state.optimizer)
        return _numbers({**terms, GRADIENT_NORM: self._step.gradient_norm()}, ALONE)

    def _refuse_not_finite(self, values: Mapping[str, float], batch: Batch, folder: Path) -> None:
        state, names = self.state, not_finite(values)
        scaler = state.scaler
        if names == [GRADIENT_NORM] and scaler.is_enabled() and scaler.get_scale() > 1:
            return  # fp16 overflowed: the scaler skips this step and takes a smaller factor
        if names:
            self.undo()
            path = save_bad_step(folder, batch, state.student, state.step, self._ranks)
            raise NonFiniteLossError(bad_step_message(state.step, names, batch, path))


def _numbers(terms: Mapping[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Bring scalars to Python in one transfer, each the mean over all processes."""
    stacked = torch.stack([term.detach().float() for term in terms.values()])
    return dict(zip(terms, ranks.mean(stacked).tolist(), strict=True))
