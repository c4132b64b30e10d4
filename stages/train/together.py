"""Which runs can learn from one stream of batches: those that would read the same."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from stages.train.identity import TrainingRun

READ = (
    "steps", "batch_size", "jitter", "resolution", "targets", "reuse", "shuffle_window",
    "teachers_per_image", "workers", "cache_megabytes",
)  # fmt: skip
"""Settings of a phase that decide what is read, and how."""


class TogetherError(ValueError):
    """Runs that are to be trained together would not read the same."""


def check_settings(runs: Sequence[TrainingRun]) -> None:
    """Refuse runs that cannot share a stream, by their settings.

    Raises:
        TogetherError: it names two runs, the setting, and both values.
    """
    check_same({run.folder.name: _read(run) for run in runs})
    if len(runs) > 1 and runs[0].phase.targets == "online":
        raise TogetherError(
            "targets: online would run the teachers once for each student; extract them once and "
            "set targets: cached, or train the students one after the other"
        )


def check_same(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse settings, by name of the run, that are not the same in all.

    Raises:
        TogetherError: it names two runs, the setting, and both values.
    """
    for (one, first), (other, second) in pairwise(settings.items()):
        for key, value in first.items():
            if second[key] != value:
                raise TogetherError(
                    f"{one} and {other} cannot be trained together, as they read differently: "
                    f"{key} is {value} in {one}, {second[key]} in {other}; make them the same, or "
                    "train the two one after the other"
                )


def all_teachers(runs: Sequence[TrainingRun]) -> tuple[str, ...]:
    """Return every teacher that one of the runs learns from, in the order of their first mention."""
    return tuple(dict.fromkeys(name for run in runs for name in run.distilled))


def _read(run: TrainingRun) -> dict[str, Any]:
    phase = run.phase.model_dump(mode="json", include=set(READ))
    found = {key: phase[key] for key in READ}
    found |= {"image_size": run.image_size, "split": run.split, "views.depth": run.depth}
    found |= {f"runtime.{key}": value for key, value in run.runtime.model_dump().items()}
    found["tasks"] = tuple(task.name for task in run.tasks)
    if run.phase.teachers_per_image is not None:  # the draw is among all of them
        found["teachers"] = run.distilled
    else:
        found["teachers"] = ()
    return found
