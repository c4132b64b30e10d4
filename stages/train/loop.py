"""The training loop: loss = sum over tasks of weight x task loss + alpha x distillation loss."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.progress import Progress
from stages.train.checkpoint import TrainingState, save_checkpoint
from stages.train.config import PhaseConfig, RuntimeConfig
from stages.train.device import autocast, pick_device
from stages.train.log import TrainingLog
from stages.train.losses import distillation_losses, task_losses
from stages.train.schedule import learning_rate
from stages.train.stream import Batch, TargetStream, batches
from stages.train.student import Student
from stages.train.targets import TargetSource
from stages.train.transfer import on_device


class NonFiniteLossError(ValueError):
    """The loss became infinite or not a number."""


@dataclass(slots=True, kw_only=True)
class Pace:
    """Wall-clock seconds, and how many of them were spent waiting for batches."""

    seconds: float = 0.0
    waited: float = 0.0


class Loop:
    """Owns what changes while training; everything it needs to go on is in `state`."""

    def __init__(
        self,
        student: Student,
        phase: PhaseConfig,
        runtime: RuntimeConfig,
        task_weights: Mapping[str, float],
        targets: TargetSource,
    ) -> None:
        self._phase, self._precision = phase, runtime.precision
        self._task_weights, self._targets = dict(task_weights), targets
        self._device = pick_device(runtime.device)
        self._student = student.to(self._device).train()
        optimizer = torch.optim.AdamW(
            student.parameters(),
            lr=phase.learning_rate,
            weight_decay=phase.weight_decay,
            fused=True,
        )
        scaler = torch.amp.GradScaler(self._device.type, enabled=runtime.precision == "fp16")
        self.state = TrainingState(
            student=student, optimizer=optimizer, scaler=scaler, step=0, window={}
        )

    def execute(
        self,
        stream: TargetStream,
        log: TrainingLog,
        progress: Progress,
        *,
        label: str,
        checkpoint: Path,
        identity: Mapping[str, Any],
    ) -> Pace:
        """Train from the state's step to the last, logging and writing checkpoints on the way.

        Raises:
            NonFiniteLossError: before the weights of that step are touched.
        """
        progress.start(label, self._phase.steps)
        progress.advance(self.state.step)
        whole, window = Pace(), Pace()
        loaded = batches(
            stream,
            batch_size=self._phase.batch_size,
            start=self.state.step,
            stop=self._phase.steps,
            workers=self._phase.workers,
            pin=self._device.type == "cuda",
        )
        source = on_device(loaded, self._device)
        started = time.perf_counter()
        while self.state.step < self._phase.steps:
            batch = next(source)
            waited = time.perf_counter() - started
            terms = self._train_on(batch)
            elapsed = time.perf_counter() - started
            started += elapsed
            for pace in (whole, window):
                pace.seconds += elapsed
                pace.waited += waited
            self._record(terms, log, window)
            if self._due(self._phase.checkpoint_every):
                save_checkpoint(checkpoint, self.state, identity)
            progress.advance(1, f"loss {terms['loss']:.4g}")
        return whole

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self._phase.steps

    def _train_on(self, batch: Batch) -> dict[str, float]:
        """Take one optimiser step and return its losses."""
        state, clip = self.state, self._phase.gradient_clip
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, self._phase)
        state.optimizer.zero_grad(set_to_none=True)
        terms = self._losses(batch)
        torch.autograd.backward(state.scaler.scale(terms["loss"]))
        values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        self._check_finite(values, batch)
        if clip is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(self._student.parameters(), clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.step += 1
        return values

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the total `loss`, and unweighted: each task's, each teacher's, their sum."""
        targets = self._targets(batch)
        with autocast(self._device, self._precision):
            output = self._student(batch.images, distillation=bool(targets))
        tasks = task_losses(output.tasks, batch.labels)
        teachers = {
            name: levels.sum()
            for name, levels in distillation_losses(output.paths, targets).items()
        }
        terms = {f"loss_{name}": loss for name, loss in tasks.items()}
        total = torch.zeros((), device=self._device)
        for name, loss in tasks.items():
            total = total + self._task_weights[name] * loss
        if teachers:
            terms["distill"] = torch.stack(list(teachers.values())).sum()
            terms |= {f"distill_{name}": loss for name, loss in teachers.items()}
            total = total + self._phase.alpha * terms["distill"]
        return {"loss": total} | {name: term.detach() for name, term in terms.items()}

    def _check_finite(self, values: Mapping[str, float], batch: Batch) -> None:
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            raise NonFiniteLossError(
                f"step {self.state.step}: {', '.join(bad)} not finite, on images "
                f"{', '.join(batch.ids)}. Lower the learning rate, set gradient_clip, use "
                "precision fp32, or look at these images' labels; the last checkpoint is intact"
            )

    def _record(self, terms: Mapping[str, float], log: TrainingLog, pace: Pace) -> None:
        """Add a step to the window, and close the window with a row of the log when it is full."""
        window = self.state.window
        for name, value in {**terms, "steps": 1.0}.items():
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
