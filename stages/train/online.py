"""Targets that the teachers compute while the student trains, instead of reading them.

What a teacher gets and what is made of its answer is what extraction does: its own preprocessing of
the row's view, in the loading processes, and the area average to the resolution that is trained on.

Letters: `B` batch, `b` those of its images that a teacher is asked for, `h w` grid, `C` channels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.averaging import area_average
from stages.train.live import LiveTeacher
from stages.train.stream import Batch
from stages.train.targets import TeacherTargets, sampling_weights
from store.spec import Grid


class OnlineTargets:
    """Asks the teachers, whose inputs are in `Batch.targets`; no feature is read from a store.

    `levels` names per teacher the (level, grid) pairs to compare, in the student's order.
    """

    def __init__(
        self,
        teachers: Mapping[str, LiveTeacher],
        levels: Mapping[str, Sequence[tuple[str, Grid]]],
    ) -> None:
        self._teachers = {name: teachers[name] for name in levels}
        self._levels = levels

    def __call__(self, batch: Batch) -> dict[str, TeacherTargets]:
        """Return the targets of a batch, on the teachers' device."""
        weights = sampling_weights(batch)
        return {
            name: TeacherTargets(
                levels=self._answer(name, inputs),
                rows=batch.target_rows[name],
                weight=weights[name],
            )
            for name, (inputs,) in batch.targets.items()
        }

    @torch.no_grad()
    def _answer(self, name: str, inputs: Tensor) -> list[Tensor]:
        """Return each level at its grid, as tensors that a loss may keep for its gradient."""
        if not len(inputs):  # no image asks this teacher: the loss looks at the length only
            return [torch.empty(0, device=inputs.device) for _ in self._levels[name]]
        answer = self._teachers[name](inputs).levels
        averaged = [area_average(answer[level], grid) for level, grid in self._levels[name]]
        return [level.clone() if level.is_inference() else level for level in averaged]
