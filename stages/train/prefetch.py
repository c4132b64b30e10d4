"""Batches are made while the step before them is computed, in a thread or in processes."""

import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

T = TypeVar("T")


def load(dataset: TorchDataset[T], draws: Iterable[Sequence[Any]], pin: bool) -> Iterator[T]:
    """Make the batches of `draws` one after the other in a thread, one ahead of who asks.

    Reading, checksums and decoding let go of Python's lock, so that the main thread goes on.
    """
    make = dataset.__getitems__  # type: ignore[attr-defined]
    made = (make(list(some)) for some in draws)
    return ahead(batch.pin_memory() for batch in made) if pin else ahead(made)


def load_by_processes(
    dataset: TorchDataset[T], draws: Iterable[Sequence[Any]], workers: int, pin: bool
) -> Iterator[T]:
    """Make the batches of `draws` in processes, two per process ahead of who asks.

    A mistake found in a process (ValueError, OSError) is raised here as it is; where it came from
    is one of its notes.
    """
    loader = DataLoader(
        _Reporting(dataset),
        batch_sampler=draws,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin,
        multiprocessing_context="spawn",
        generator=torch.Generator(),  # else the loader draws from the global one, unlike a resume
    )
    return _raising(iter(loader))


def ahead(source: Iterator[T]) -> Iterator[T]:
    """Iterate over `source` in a thread that is one item ahead; errors are raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        end = object()
        coming = deque(thread.submit(next, source, end) for _ in range(2))
        while (item := coming.popleft().result()) is not end:
            yield item  # type: ignore[misc]
            coming.append(thread.submit(next, source, end))


class _Reporting(TorchDataset[Any]):
    """Returns mistakes instead of raising them: the loader would add its traceback to the text."""

    def __init__(self, dataset: TorchDataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, draws: list[Any]) -> Any:
        try:
            return self._dataset.__getitems__(draws)  # type: ignore[attr-defined]
        except (ValueError, OSError) as error:
            error.add_note(traceback.format_exc())
            return error


def _raising(results: Iterator[Any]) -> Iterator[Any]:
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result


def _unchanged(batch: Any) -> Any:
    return batch
