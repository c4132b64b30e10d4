"""Hands (teacher, shard) units to dask workers: this machine's, or those of a running scheduler.

Dask moves units off workers that die and gives them to workers that join; the store's locks see to
it that none is written twice, whoever else is at the same store.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import uuid4

import dask
import torch
from distributed import Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, wait

from stages.extract.clock import total
from stages.extract.errors import WorkersLostError
from stages.extract.run import ExtractSummary
from stages.extract.units import (
    Begun,
    Job,
    UnitSummary,
    begin,
    extract_unit,
    finish,
    wait_for_unit,
)
from stages.memory import KEPT
from stages.progress import Progress
from stages.stopping import Terminated

_Result = TypeVar("_Result")

_RETRIES = 2
_DEATHS = 10
"""Workers that may die over one unit; dask counts those in whose queue it merely was."""

_SCHEDULER_GONE = (
    "the dask scheduler is gone, or dropped the work; what is written is safe: start it again and "
    "run the same command, it resumes"
)
_LOOK_SECONDS, _PATIENCE_SECONDS = 5, 300
_LOCAL = "127.0.0.1"


@contextmanager
def local_workers(count: int, device: str) -> Iterator[Client]:
    """Start worker processes on this machine, each with its share of the cores and its own GPU.

    `device` is that of the parameter file. A worker that dies is replaced. With more workers than
    GPUs, some share one.
    """
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    threads = max(1, (os.cpu_count() or 1) // count)
    workers = {
        number: {"cls": Nanny, "options": _worker(threads, number % gpus if gpus else None)}
        for number in range(count)
    }
    scheduler = {"cls": Scheduler, "options": {"host": _LOCAL, "dashboard_address": f"{_LOCAL}:0"}}
    settings = {
        "distributed.scheduler.allowed-failures": _DEATHS,
        # Dask dismisses a worker that it has not seen for 15 s, also one that is just starting
        # anew, which takes longer on a busy machine; then nobody would be left.
        "distributed.deploy.lost-worker-timeout": "1h",
    }
    with (
        dask.config.set(settings),
        SpecCluster(workers=workers, scheduler=scheduler, silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _worker(threads: int, gpu: int | None) -> dict[str, Any]:
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), **KEPT}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    return {
        "nthreads": 1, "memory_limit": 0, "dashboard": False, "host": _LOCAL, "env": environment,
        "silence_logs": 50,
    }  # fmt: skip


@contextmanager
def scheduler_workers(address: str) -> Iterator[Client]:
    """Use the workers of a running scheduler, started with `dask worker ADDRESS --nthreads 1`.

    Raises:
        OSError: nothing answers there.
    """
    with Client(address, timeout="20s") as client:
        yield client


def extract_on(client: Client, job: Job, progress: Progress) -> ExtractSummary:
    """Have workers extract a teacher, as `extract` does it in this process.

    Raises:
        WorkersLostError: workers died over the same unit again and again, or the scheduler is gone.
        Terminated: SIGTERM came; what workers had begun is committed.
        ExtractionError, TeacherError, StoreError: as `extract` raises them.
    """
    started = time.perf_counter()
    job = job.anywhere()
    progress.start(f"waiting for workers to begin {job.name}", 1)
    client.wait_for_workers(1)
    begun = _one(client, begin, job)
    progress.start(f"extract {job.name}", sum(map(len, begun.missing)))
    done: list[UnitSummary] = []
    left = begun
    while left.missing:
        known = len(done)
        _round(client, job, left.missing, done, progress)
        written = done[known:]
        if not written:
            time.sleep(1.0)  # somebody else is at all that is left
        before, left = left, _one(client, begin, job)
        progress.advance(_rows(before) - _rows(left) - sum(len(unit.rows) for unit in written))
    _one(client, finish, job)
    return _summary(job, begun, done, time.perf_counter() - started)


def _round(
    client: Client,
    job: Job,
    missing: Sequence[range],
    done: list[UnitSummary],
    progress: Progress,
) -> None:
    """Have every one of these shards computed that nobody else is at; add those written to `done`."""
    futures: list[Future] = []
    started, images = time.perf_counter(), 0
    try:
        resources = _resources(client)
        futures.extend(
            _submit(client, extract_unit, job, rows, resources=resources) for rows in missing
        )
        for future in _completed(client, futures):
            unit = _result(future)
            if unit.written:
                done.append(unit)
                images += unit.images
                note = _note(client, done, images / (time.perf_counter() - started))
                progress.advance(len(unit.rows), note)
    except BaseException as error:
        client.cancel(futures, force=True)
        if isinstance(error, Terminated):
            _drain(client)
        raise


def _note(client: Client, done: Sequence[UnitSummary], rate: float) -> str:
    """Return what the progress line shows: how many work, how fast, and what holds them up."""
    note = f"{len(client.nthreads())} workers, {rate:.1f} images/s"
    times = total([one.stages for one in done if one.stages is not None])
    return note if times is None else f"{note}, {times.bottleneck} is the bottleneck"


def _completed(client: Client, futures: Sequence[Future]) -> Iterator[Future]:
    """Yield futures as they complete.

    Raises:
        WorkersLostError: this machine's workers are gone for good; a cluster's may come back.
    """
    left, alone = set(futures), 0
    while left:
        try:
            done, left = wait(list(left), timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED")
        except TimeoutError:
            alone = 0 if client.nthreads() or client.cluster is None else alone + 1
            if alone * _LOOK_SECONDS >= _PATIENCE_SECONDS:
                raise WorkersLostError(
                    f"no worker process has come up for {_PATIENCE_SECONDS} s; if the system kills "
                    "them for their memory, use fewer workers. What is written is safe: run the "
                    "same command again, it resumes"
                ) from None
        except CancelledError as error:
            raise WorkersLostError(_SCHEDULER_GONE) from error
        else:
            alone = 0
            yield from done


def _drain(client: Client) -> None:
    """Wait until no worker is at a unit; dask cannot stop what runs, only what waits.

    A worker that was told to end as well comes back, if at all, under another address.
    """
    tasks = {one: _submit(client, wait_for_unit, workers=[one]) for one in client.nthreads()}
    while tasks:
        alive = client.nthreads()
        tasks = {one: task for one, task in tasks.items() if one in alive and not task.done()}
        time.sleep(0.2)


def _one(client: Client, function: Callable[[Job], _Result], job: Job) -> _Result:
    answer: _Result = _result(_submit(client, function, job, resources=_resources(client)))
    return answer


def _submit(
    client: Client, function: Callable[..., Any], *arguments: Any, **options: Any
) -> Future:
    return client.submit(
        function,
        *arguments,
        key=f"sak-{function.__name__}-{uuid4().hex}",
        pure=False,
        retries=_RETRIES,
        **options,
    )


def _resources(client: Client) -> Mapping[str, float] | None:
    """Ask for a worker with a GPU where some worker declares one (`--resources GPU=1`)."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return {"GPU": 1} if any(worker["resources"].get("GPU") for worker in workers) else None


def _result(future: Future) -> Any:
    try:
        return future.result()
    except KilledWorker as error:
        raise WorkersLostError(
            f"{_DEATHS} workers or more died while they were at the same shard, such as "
            f"{error.last_worker.address}; if the system killed them for their memory, use fewer "
            "workers or a smaller `extract: {batch_size: ...}`. What is written is safe: run the "
            "same command again, it resumes"
        ) from error
    except CancelledError as error:
        raise WorkersLostError(_SCHEDULER_GONE) from error


def _rows(begun: Begun) -> int:
    return sum(map(len, begun.missing))


def _summary(job: Job, begun: Begun, done: Sequence[UnitSummary], seconds: float) -> ExtractSummary:
    rows, images = sum(len(unit.rows) for unit in done), sum(unit.images for unit in done)
    return ExtractSummary(
        teacher=job.name,
        images=images,
        quarantined=rows - images,
        already_there=begun.rows - rows,
        seconds=seconds,
        images_per_second=images / seconds,
        bytes_written=rows * begun.row_bytes,
        shards_written=len(done),
        stages=total([one.stages for one in done if one.stages is not None]),
        drift=begun.drift,
    )
