"""Checkpoints: everything a killed run needs to go on as if nothing had happened."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.train.files import write_atomically

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint belongs to another run or cannot be read."""


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """The parts of a run that change from step to step."""

    student: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int
    """Steps done; the schedule and the order of images follow from it."""
    window: dict[str, float]
    """Sums of the losses since the last row of the log."""


def save_checkpoint(path: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    """Write model, optimiser, scaler, random states and step, with the run's identity."""
    payload = {
        "format": FORMAT,
        "identity": flatten(identity),
        "step": state.step,
        "student": state.student.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "window": state.window,
        "random": _random_states(),
    }
    write_atomically(path, lambda temporary: torch.save(payload, temporary))


def load_checkpoint(path: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    """Bring `state` and the random generators to where a checkpoint was written.

    Raises:
        CheckpointError: not a checkpoint of ours, or of another student, setting or store; the
            message lists each difference.
    """
    payload = _read(path)
    if lines := differences(payload["identity"], flatten(identity)):
        listed = "\n  ".join(lines)
        raise CheckpointError(
            f"{path} belongs to another run; it differs in:\n  {listed}\n"
            f"Restore these settings to resume it, or delete {path.parent} to start again"
        )
    state.student.load_state_dict(payload["student"])
    state.optimizer.load_state_dict(payload["optimizer"])
    state.scaler.load_state_dict(payload["scaler"])
    state.step = payload["step"]
    state.window.clear()
    state.window.update(payload["window"])
    _restore_random_states(payload["random"])


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
    advice = f"delete {path} to start again"
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read, it is damaged; {advice}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT}; {advice}")
    return payload


def _random_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
    }


def _restore_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    assert isinstance(keys, Tensor)
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
