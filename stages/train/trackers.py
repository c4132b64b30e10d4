"""TensorBoard and Weights & Biases, where the settings ask for them; neither is needed.

`log.csv` is always written; `dvc plots show` draws it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

Tracker = Callable[[Mapping[str, float]], None]
"""Takes a row of the log; `step` is one of its columns."""


class TrackerError(ValueError):
    """A tracker that the settings ask for is not installed."""


@contextmanager
def opened_trackers(names: Sequence[str], folder: Path) -> Iterator[list[Tracker]]:
    """Open the trackers of a run in its folder, and close them at the end.

    Raises:
        TrackerError: one is not installed; the message says how to get it.
    """
    openers = {"tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as stack:
        yield [openers[name](folder, stack) for name in names]


def _tensorboard(folder: Path, stack: ExitStack) -> Tracker:
    writer = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter(
        folder / "tensorboard"
    )
    stack.callback(writer.close)

    def write(row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, global_step=int(row["step"]))

    return write


def _wandb(folder: Path, stack: ExitStack) -> Tracker:
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
