"""Where and in which number format to compute."""

import resource
import sys
from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceError(ValueError):
    """The device asked for does not exist here."""


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is the first GPU, else the CPU.

    Raises:
        DeviceError: torch knows no such device, or it is not present.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise DeviceError(
            f"runtime.device {name!r} cannot be used ({first_line}); use 'auto' or 'cpu'"
        ) from error
    return device


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Compute matrix products inside this context in `precision`."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")


def peak_memory_megabytes() -> float:
    """Return the largest resident memory of this process so far, in 10^6 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
