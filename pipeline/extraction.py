"""`sak extract-teachers`: stage one, one teacher after the other, by this process or by workers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.filesize import decimal

from pipeline.errors import StepError
from pipeline.indexing import require_views
from pipeline.params import Params
from pipeline.report import Report
from stages.data.dataset import open_dataset
from stages.extract.run import ExtractSummary, extract
from stages.progress import Progress
from stages.stopping import stop_on_sigterm
from store.collect import collect_garbage
from store.errors import StoreMismatchError

_Extract = Callable[[str], ExtractSummary]


def extract_teachers(
    params: Params,
    names: list[str],
    replace: bool,
    progress: Progress,
    workers: int | None = None,
    scheduler: str | None = None,
) -> Report:
    """Extract the named teachers, or all of them, one after the other.

    By so many `workers` on this machine, or by those of a dask `scheduler` at this address.
    """
    if workers is not None and scheduler is not None:
        raise StepError(
            "--workers starts processes on this machine, --scheduler uses those of a running "
            "cluster; choose one of them"
        )
    unknown = sorted(set(names) - params.teachers.keys())
    if unknown:
        raise StepError(
            f"no teacher named {', '.join(unknown)} in the parameter file; "
            f"it has {', '.join(params.teachers)}"
        )
    require_views(params)
    with _extractor(params, progress, workers, scheduler) as extract_one:
        return _report(
            [
                _replacing(params, name, replace, extract_one)
                for name in names or list(params.teachers)
            ]
        )


@contextmanager
def _extractor(
    params: Params, progress: Progress, workers: int | None, scheduler: str | None
) -> Iterator[_Extract]:
    """Give the function that extracts a teacher by name, stopping well on SIGTERM."""
    with stop_on_sigterm() as stop:
        if workers is None and scheduler is None:
            images = open_dataset(params.data).images
            yield lambda name: extract(
                params.store, images, params.image_size, name, params.teachers[name],
                params.extract, progress, stop,
            )  # fmt: skip
            return
        from stages.extract import cluster  # dask.distributed: only where it is asked for
        from stages.extract.units import Job

        if scheduler is None:
            clients = cluster.local_workers(workers or 1, params.extract.device)
        else:
            clients = cluster.scheduler_workers(scheduler)
        with clients as client:
            yield lambda name: cluster.extract_on(
                client,
                Job(
                    store=params.store,
                    data=params.data,
                    image_size=params.image_size,
                    name=name,
                    teacher=params.teachers[name],
                    settings=params.extract,
                ),
                progress,
            )


def _report(results: list[ExtractSummary]) -> Report:
    rows = tuple(
        (
            one.teacher,
            one.images,
            one.already_there,
            one.quarantined,
            one.seconds,
            one.images_per_second,
            decimal(one.bytes_written),
            one.shards_written,
        )
        for one in results
    )
    return Report(
        columns=(
            "teacher", "images", "already there", "quarantined", "seconds", "images/s", "written",
            "shards",
        ),
        rows=rows,
        data={"teachers": [asdict(one) for one in results]},
    )  # fmt: skip


def _replacing(params: Params, name: str, replace: bool, extract_one: _Extract) -> ExtractSummary:
    """Extract a teacher, after deleting what was written under other settings if `replace`."""
    try:
        return extract_one(name)
    except StoreMismatchError as error:
        if not replace:
            advice = f"or drop them with: sak extract-teachers {name} --replace"
            raise StepError(f"{error}\n{advice}") from error
    dropped = collect_garbage(params.store, drop=[name], delete=True)
    if any(one.busy for one in dropped):
        raise StepError(f"teacher {name!r} is being written by another process; stop it first")
    return extract_one(name)
