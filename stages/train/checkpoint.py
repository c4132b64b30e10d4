"""Checkpoints: everything a killed run needs to go on as if nothing had happened.

Random numbers need no place in them: those of a step follow from seed, step and process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from stages.train.files import load_whole, write_atomically

FORMAT = 3


class CheckpointError(ValueError):
    """A checkpoint belongs to another run."""


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """The parts of a run that change from step to step."""

    student: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int
    """Steps done; the schedule, the order of images and all random numbers follow from it."""
    window: dict[str, float]
    """Sums of the losses since the last row of the log."""
    average: AveragedModel | None = None
    """Moving average of the student."""
    best: tuple[str, float, int] | None = None
    """The column that `keep_best` names, its lowest value, and the step of that checkpoint."""


def save_checkpoint(path: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    """Write model, average, optimiser, scaler and step, with the run's identity."""
    payload = {
        "format": FORMAT,
        "identity": flatten(identity),
        "step": state.step,
        "student": state.student.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "window": state.window,
        "average": None if state.average is None else state.average.state_dict(),
        "best": state.best,
    }
    write_atomically(path, lambda temporary: torch.save(payload, temporary))


def load_checkpoint(path: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    """Bring `state` to where a checkpoint was written.

    Raises:
        CheckpointError: it is of another student, setting or store; the message lists each
            difference.
        DamagedFileError: a checksum does not match, or it is not one at all.
    """
    payload = _read(path)
    if lines := differences(payload["identity"], flatten(identity)):
        listed = "\n  ".join(lines)
        raise CheckpointError(
            f"{path} belongs to another run; it differs in:\n  {listed}\n"
            "Restore these settings to resume it, or give --restart: it deletes the checkpoints in "
            f"{path.parent} and starts again"
        )
    state.student.load_state_dict(payload["student"])
    state.optimizer.load_state_dict(payload["optimizer"])
    state.scaler.load_state_dict(payload["scaler"])
    state.step = payload["step"]
    state.window.clear()
    state.window.update(payload["window"])
    state.best = None if payload["best"] is None else tuple(payload["best"])
    if state.average is not None:
        state.average.load_state_dict(payload["average"])


def flatten(identity: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn nested settings into `section.key -> text`, the form in which they are compared."""
    flat: dict[str, str] = {}
    for key, value in identity.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = str(list(value) if isinstance(value, tuple) else value)
    return flat


def differences(saved: Mapping[str, str], asked: Mapping[str, str]) -> list[str]:
    """Say in one line each how two flattened identities differ."""
    return [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {asked.get(name, 'absent')} asked"
        for name in sorted(saved.keys() | asked.keys())
        if saved.get(name) != asked.get(name)
    ]


def _read(path: Path) -> dict[str, Any]:
    payload = load_whole(path)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT}; delete it")
    return payload
