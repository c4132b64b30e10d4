"""How much better a multi-task model is than one model per task, in one number and one table.

delta_m = (100 / T) sum_i (-1)^{l_i} (M_i - S_i) / S_i, in percent, over T tasks with metric M_i,
single-task metric S_i, and l_i = 1 where lower is better (Maninis et al., CVPR 2019, the same in
SAK, arXiv 2410.14633, section 4).

A task counts when its metric is a benchmark's: the boundary loss, which stands in until the
boundary F-measure (odsF) exists, does not. What counted and what did not is part of the result.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.data.tasks import Task

SINGLE_TASK = "single-task"
"""Name of the row that holds one model per task."""
LOSS_REASON = "reported as a loss until the boundary F-measure (odsF) exists; no part of delta_m"


class DeltaError(ValueError):
    """Results that delta_m cannot be computed from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One task of the table."""

    task: str
    metric: str
    lower_is_better: bool
    left_out: str | None
    """Why the task is no part of delta_m; None when it counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model, or for the single-task row one model per task."""

    run: str
    values: Mapping[str, float | None]
    """Metric per task; None where the run has no such task, NaN where nothing was labelled."""
    delta_m: float | None
    """Percent over the counted tasks; None when no task counts or the run lacks one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The evaluation table."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def tasks_counted(self) -> tuple[str, ...]:
        """Tasks that delta_m runs over."""
        return tuple(column.task for column in self.columns if column.left_out is None)

    def as_json(self) -> dict[str, Any]:
        """Return plain values; None stands for what is not there or not defined."""
        return {
            "tasks_counted": list(self.tasks_counted),
            "tasks_left_out": {
                column.task: column.left_out for column in self.columns if column.left_out
            },
            "metrics": {column.task: column.metric for column in self.columns},
            "lower_is_better": {column.task: column.lower_is_better for column in self.columns},
            "runs": {
                row.run: {
                    "metrics": {task: _defined(value) for task, value in row.values.items()},
                    "delta_m": row.delta_m,
                }
                for row in self.rows
            },
        }


def delta_m(
    results: Mapping[str, float],
    single_task: Mapping[str, float],
    lower_is_better: Mapping[str, bool],
) -> float:
    """Return delta_m in percent over the tasks of `lower_is_better`.

    Raises:
        DeltaError: there is no task, or a task's metric is missing, not finite, or has a baseline of 0.
    """
    if not lower_is_better:
        raise DeltaError("delta_m needs at least one task")
    gains = []
    for task, lower in lower_is_better.items():
        for name, values in (("results", results), ("single-task baseline", single_task)):
            if not math.isfinite(values.get(task, math.nan)):
                raise DeltaError(
                    f"delta_m needs a finite metric of task '{task}' in the {name}, got "
                    f"{values.get(task)}; evaluate that run, or leave the task out of both"
                )
        if single_task[task] == 0:
            raise DeltaError(f"delta_m is not defined for task '{task}': its baseline is 0")
        gain = (results[task] - single_task[task]) / single_task[task]
        gains.append(-gain if lower else gain)
    return 100 * sum(gains) / len(gains)


def compare(
    tasks: Sequence[Task],
    results: Mapping[str, Mapping[str, float]],
    single_task: Mapping[str, float],
) -> Comparison:
    """Tabulate runs against the single-task baselines.

    A task is left out of delta_m for all runs alike: because its metric is a loss, or because its
    baseline is missing, not defined (NaN) or 0. A run that lacks a counted task gets no delta_m.

    `tasks` are the columns; `results` holds each run's metric per task, in the order of the rows
    below the single-task row; `single_task` holds the metric of the model trained on that task
    alone, and may be empty.

    Raises:
        DeltaError: a run carries the name of the single-task row, or a task that is no column.
    """
    known = {task.name for task in tasks}
    for run, values in {SINGLE_TASK: single_task, **results}.items():
        if unknown := sorted(set(values) - known):
            raise DeltaError(f"run '{run}' has tasks {unknown} that are not among {sorted(known)}")
    if SINGLE_TASK in results:
        raise DeltaError(f"'{SINGLE_TASK}' names the baseline's own row; rename that run")
    columns = tuple(
        Column(
            task=task.name,
            metric=task.metric,
            lower_is_better=task.lower_is_better,
            left_out=_reason_to_leave_out(task, single_task),
        )
        for task in tasks
    )
    counted = {column.task: column.lower_is_better for column in columns if not column.left_out}
    rows = [(SINGLE_TASK, single_task)] if single_task else []
    return Comparison(
        columns=columns,
        rows=tuple(
            _row(run, values, single_task, columns, counted)
            for run, values in [*rows, *results.items()]
        ),
    )


def _reason_to_leave_out(task: Task, single_task: Mapping[str, float]) -> str | None:
    if task.metric.endswith("loss"):
        return LOSS_REASON
    baseline = single_task.get(task.name)
    if baseline is None:
        return "no single-task baseline was evaluated"
    if not math.isfinite(baseline):
        return "no labelled pixel in the evaluated split"
    if baseline == 0:
        return "the single-task baseline is 0"
    return None


def _row(
    run: str,
    values: Mapping[str, float],
    single_task: Mapping[str, float],
    columns: Sequence[Column],
    counted: Mapping[str, bool],
) -> Row:
    complete = bool(counted) and counted.keys() <= values.keys()
    return Row(
        run=run,
        values={column.task: values.get(column.task) for column in columns},
        delta_m=delta_m(values, single_task, counted) if complete else None,
    )


def _defined(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
