"""Batches travel to the device while the step before them is computed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from stages.train.prefetch import ahead
from stages.train.stream import Batch


def on_device(source: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy batches to a device; to a GPU one ahead, on a stream of its own, beside the step.

    Batches in page-locked memory (`Batch.pin_memory`) are copied without anybody waiting.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in source)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch, copied in ahead(_copies(source, device, side)):
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        batch.used_by(current)
        yield batch


def _copies(
    source: Iterator[Batch], device: torch.device, side: Any
) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    for batch in source:
        with torch.cuda.stream(side):
            copy = batch.to(device)
        yield copy, side.record_event()


def of_teachers(batch: Batch, teachers: Sequence[str]) -> Batch:
    """Return a batch with the targets of these teachers alone; nothing is copied."""
    return replace(
        batch,
        targets={name: batch.targets[name] for name in teachers},
        target_rows={name: batch.target_rows[name] for name in teachers},
    )
