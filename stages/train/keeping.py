"""Which checkpoints of a run are kept, and which of them it goes on from."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.train.checkpoint import (
    CheckpointError,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
)
from stages.train.files import DamagedFileError
from store.errors import nearest
from store.files import remove_partials

_NAME = re.compile(r"checkpoint-(\d{8,})\.pt")

logger = logging.getLogger(__name__)


class NoSuchColumnError(ValueError):
    """`keep_best` names a value that is not logged."""


def check_keep_best(name: str | None, columns: Sequence[str]) -> None:
    """Refuse a `keep_best` that is not among the losses that will be logged.

    Raises:
        NoSuchColumnError: with the nearest name.
    """
    if name is not None and name not in columns:
        raise NoSuchColumnError(
            f"keep_best: no loss {name!r} will be logged; {nearest(name, columns)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one run folder: `checkpoint-00000040.pt` is the state after 40 steps."""

    folder: Path
    identity: Mapping[str, Any]
    keep_last: int
    keep_best: str | None

    def resume(self, state: TrainingState) -> bool:
        """Bring `state` to the newest checkpoint that is whole; return whether there is one.

        Raises:
            CheckpointError: it is of another run, or there are only damaged ones.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                load_checkpoint(path, state, self.identity)
            except DamagedFileError as error:
                logger.warning("%s; going on from the checkpoint before", error)
            else:
                return True
        if paths:
            raise CheckpointError(
                f"all {len(paths)} checkpoints in {self.folder} are damaged; delete them to start "
                "again, and look at the disk"
            )
        return False

    def save(self, state: TrainingState, logged: Mapping[str, float]) -> None:
        """Write a checkpoint atomically, then remove those that need not be kept.

        Those of later steps go too: a run that went on from an earlier one found them damaged.
        """
        self._judge(state, logged)
        save_checkpoint(self._path(state.step), state, self.identity)
        self._prune(state)

    def clean(self, state: TrainingState) -> None:
        """Remove what a killed run left half-written or had no time to remove; `state` is the one
        that it goes on from. For the folder's only writer."""
        remove_partials(self.folder)
        self._prune(state)

    def _prune(self, state: TrainingState) -> None:
        past = [path for path in self._paths() if _step(path) <= state.step]
        kept = {*past[-self.keep_last :]}
        if state.best is not None:
            kept.add(self._path(state.best[2]))
        for path in self._paths():
            if path not in kept:
                path.unlink()

    def _judge(self, state: TrainingState, logged: Mapping[str, float]) -> None:
        if state.best is not None and state.best[0] != self.keep_best:
            state.best = None  # of a column that was asked for before this process
        if self.keep_best is None or not logged:
            return
        value = logged[self.keep_best]
        if state.best is None or value < state.best[1]:
            state.best = (self.keep_best, value, state.step)

    def _path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step:08d}.pt"

    def _paths(self) -> list[Path]:
        """Return the checkpoints that there are, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.stem.partition("-")[2])
