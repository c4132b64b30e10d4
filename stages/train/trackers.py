"""DVCLive, TensorBoard and Weights & Biases, where the settings ask for them; none is needed.

`log.csv` is always written; `dvc plots show` draws it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from stages.train.log import Tracker, TrainingLog
from store.files import remove_tree


class TrackerError(ValueError):
    """A tracker that the settings ask for is not installed."""


@contextmanager
def opened_trackers(
    names: Sequence[str], folder: Path, log: TrainingLog
) -> Iterator[list[Tracker]]:
    """Open the trackers of a run in its folder, and close them at the end.

    What they have of steps after the last row of `log` is taken back, or overwritten.

    Raises:
        TrackerError: one is not installed; the message says how to get it.
    """
    openers = {"dvclive": _dvclive, "tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as stack:
        yield [openers[name](folder, log, stack) for name in names]


def _dvclive(folder: Path, log: TrainingLog, stack: ExitStack) -> Tracker:
    """Plots and `metrics.json` below `dvclive/`, written anew from the log when a run goes on."""
    target = folder / "dvclive"
    live_class = _library("dvclive", "dvclive").Live
    if target.exists():
        remove_tree(target)
    live = live_class(str(target), report=None, save_dvc_exp=False, dvcyaml=None)
    stack.callback(live.end)

    def write(row: Mapping[str, float]) -> None:
        live.step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                live.log_metric(name, value)
        live.make_summary()

    for row in log.past:
        write(row)
    return write


def _tensorboard(folder: Path, log: TrainingLog, stack: ExitStack) -> Tracker:
    writer = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter(
        folder / "tensorboard", purge_step=int(log.last["step"]) + 1 if log.last else None
    )
    stack.callback(writer.close)

    def write(row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, global_step=int(row["step"]))

    return write


def _wandb(folder: Path, log: TrainingLog, stack: ExitStack) -> Tracker:
    """Rows of one run folder belong to one W&B run, also after a resume."""
    run = _library("wandb", "wandb").init(
        project="sak", name=folder.name, id=folder.name, resume="allow", dir=folder
    )
    stack.callback(run.finish)

    def write(row: Mapping[str, float]) -> None:
        values = {name: value for name, value in row.items() if name != "step"}
        run.log(values, step=int(row["step"]))

    return write


def _library(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise TrackerError(
            f"runtime.trackers: {extra} is not installed ({error}); "
            f"pip install 'sak-distill[{extra}]', or take it out of runtime.trackers"
        ) from error
