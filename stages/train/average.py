"""The moving average of a student's weights, and which weights a finished run hands over."""

from typing import Literal

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stages.train.checkpoint import TrainingState
from stages.train.student import Student
from stages.train.trainable import merged

Held = Literal["average", "last step"]


def start_average(student: Student, decay: float | None) -> AveragedModel | None:
    """Return an average that begins with the first update, or None where none is asked for.

    After update t it is decay x average + (1 - decay) x weights; the statistics of batch
    normalisation are averaged alike.
    """
    if decay is None:
        return None
    update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(student, multi_avg_fn=update, use_buffers=True).requires_grad_(False)


def finished_student(state: TrainingState) -> tuple[Student, Held]:
    """Return the student to save, low-rank changes merged, and which weights it holds."""
    source = state.student if state.average is None else state.average.module
    assert isinstance(source, Student)
    return merged(source), "last step" if state.average is None else "average"
