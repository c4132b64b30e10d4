"""What stops a run before it harms: numbers that are not finite, memory that runs out."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.memory import is_out_of_memory
from stages.train.distributed import Ranks
from stages.train.files import DamagedFileError, load_whole, write_atomically
from stages.train.stream import Batch

FORMAT = 1


class NonFiniteLossError(ValueError):
    """The loss or the gradient became infinite or not a number."""


class OutOfMemoryError(ValueError):
    """A step does not fit into memory."""


class ReplayError(ValueError):
    """A saved step cannot be computed again."""


def not_finite(values: Mapping[str, float]) -> list[str]:
    """Return the names of the values that are infinite or not a number."""
    return [name for name, value in values.items() if not math.isfinite(value)]


def save_bad_step(folder: Path, batch: Batch, weights: nn.Module, step: int, ranks: Ranks) -> Path:
    """Write what is needed to compute a step again: its batch and the weights before it.

    Together with the seed, `step` (zero-based) and process give the random numbers.
    """
    suffix = f"-rank{ranks.rank}" if ranks.world > 1 else ""
    path = folder / f"not-finite-{step:08d}{suffix}.pt"
    payload = {
        "format": FORMAT,
        "step": step,
        "rank": ranks.rank,
        "batch": asdict(batch),
        "weights": weights.state_dict(),
    }
    write_atomically(path, lambda temporary: torch.save(payload, temporary))
    return path


def load_bad_step(path: Path) -> dict[str, Any]:
    """Return what `save_bad_step` wrote, the batch as a `Batch`.

    Raises:
        ReplayError: there is no such file, or it is something else.
    """
    if not path.is_file():
        raise ReplayError(f"no file at {path}; a run that meets such a step names what it wrote")
    try:
        payload: dict[str, Any] = load_whole(path)
        if payload["format"] != FORMAT:
            raise ReplayError(f"{path} is of format {payload['format']}, expected {FORMAT}")
        payload["batch"] = Batch(**payload["batch"])
    except (DamagedFileError, KeyError, TypeError) as error:
        raise ReplayError(f"{path} holds no step that a run has saved ({error!r})") from error
    return payload


def bad_step_message(step: int, names: list[str], batch: Batch, path: Path) -> str:
    """Say what happened at a step (zero-based) and what can be done."""
    return (
        f"step {step}: {', '.join(names)} not finite, on images {', '.join(batch.ids)}. No weight "
        f"was touched; batch and weights are in {path}, and the same command with `--replay {path}` "
        "computes that step again and shows each term. Look at these images' labels; or lower the "
        "learning rate, set gradient_clip or use precision fp32, and train again with --restart, "
        "since checkpoints go on under their own settings only"
    )


@contextmanager
def memory_told(step: int, images: int, device: torch.device) -> Iterator[None]:
    """Turn memory that runs out in a step with `images` images at once into a message.

    Raises:
        OutOfMemoryError: it did; other errors pass through.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"step {step}: out of memory on {device.type} with {images} images at once. Double "
            "`accumulate` (the same step in more parts), set runtime.activation_checkpointing, use "
            "precision bf16, or lower batch_size; the same command then goes on from the last "
            "checkpoint, unless batch_size or precision changed"
        ) from error
