"""What one student's run leaves behind while it learns: rows of its log, and checkpoints."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.train.checkpoint import TrainingState
from stages.train.config import PhaseConfig
from stages.train.keeping import Checkpoints
from stages.train.log import TrainingLog
from stages.train.schedule import learning_rate


@dataclass(slots=True, kw_only=True)
class Pace:
    """Wall-clock seconds, and how many of them were spent waiting for batches."""

    seconds: float = 0.0
    waited: float = 0.0

    def add(self, seconds: float, waited: float) -> None:
        """Count a step."""
        self.seconds += seconds
        self.waited += waited


class Record:
    """The log and the checkpoints of one student; only a `writer` writes checkpoints."""

    def __init__(
        self, phase: PhaseConfig, log: TrainingLog, checkpoints: Checkpoints, writer: bool = True
    ) -> None:
        self._phase, self._checkpoints, self._writer = phase, checkpoints, writer
        self.log, self.pace, self._window = log, Pace(), Pace()
        self._saved_step, self._started = 0, 0.0

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self._checkpoints.folder

    def start(self) -> None:
        """Begin to count the time."""
        self._started = time.perf_counter()

    def add(self, state: TrainingState, terms: Mapping[str, float], waited: float) -> None:
        """Note a finished step, and write what is due after it."""
        now = time.perf_counter()
        for pace in (self.pace, self._window):
            pace.add(now - self._started, waited)
        self._started = now
        self._note(state, terms)
        if self._due(state, self._phase.checkpoint_every):
            self.save(state)

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, unless there is one of this step."""
        if self._writer and self._saved_step != state.step:
            self._checkpoints.save(state, self.log.last)
            self._saved_step = state.step

    def _due(self, state: TrainingState, every: int) -> bool:
        return state.step % every == 0 or state.step == self._phase.steps

    def _note(self, state: TrainingState, terms: Mapping[str, float]) -> None:
        """Add a step to the window, and close the window with a row of the log when it is full."""
        window = state.window
        for name, value in {**terms, "steps": 1.0}.items():
            if math.isfinite(value):  # all but the gradient of a step that fp16 skips
                window[name] = window.get(name, 0.0) + value
        if not self._due(state, self._phase.log_every):
            return
        steps = window.pop("steps")
        row = {"step": float(state.step)}
        row["learning_rate"] = learning_rate(state.step - 1, self._phase)
        row |= {name: total / steps for name, total in window.items()}
        row["images_per_second"] = self._phase.batch_size * steps / self._window.seconds
        row["data_wait"] = self._window.waited / self._window.seconds
        self.log.append(row)
        window.clear()
        self._window = Pace()
