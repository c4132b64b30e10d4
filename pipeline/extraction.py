"""`sak extract-teachers`: stage one, by this process or by workers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.filesize import decimal

from pipeline.errors import StepError
from pipeline.indexing import require_views
from pipeline.params import Params
from pipeline.report import Report
from stages.data.dataset import open_dataset
from stages.extract.clock import StageTimes
from stages.extract.run import ExtractSummary, extract
from stages.progress import Progress
from stages.stopping import stop_on_sigterm
from store.collect import collect_garbage
from store.errors import StoreMismatchError

_Extract = Callable[[list[str]], list[ExtractSummary]]


def extract_teachers(
    params: Params,
    names: list[str],
    replace: bool,
    progress: Progress,
    workers: int | None = None,
    scheduler: str | None = None,
    together: bool = False,
) -> Report:
    """Extract the named teachers, or all of them, one after the other or `together` in one pass.

    By so many `workers` on this machine, or by those of a dask `scheduler` at this address.
    """
    if together and (workers is not None or scheduler is not None):
        raise StepError(
            "--together is for one process; workers compute a shard of one teacher at a time"
        )
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
    chosen = names or list(params.teachers)
    groups = [chosen] if together else [[name] for name in chosen]
    with _extractor(params, progress, workers, scheduler) as extract_some:
        results = [_replacing(params, group, replace, extract_some) for group in groups]
    return _report([one for some in results for one in some])


@contextmanager
def _extractor(
    params: Params, progress: Progress, workers: int | None, scheduler: str | None
) -> Iterator[_Extract]:
    """Give the function that extracts teachers by name, stopping well on SIGTERM."""
    with stop_on_sigterm() as stop:
        if workers is None and scheduler is None:
            images = open_dataset(params.data).images
            yield lambda names: extract(
                params.store, images, params.image_size,
                {name: params.teachers[name] for name in names}, params.extract, progress, stop,
            )  # fmt: skip
            return
        from stages.extract import cluster  # dask.distributed: only where it is asked for
        from stages.extract.units import Job

        if scheduler is None:
            clients = cluster.local_workers(workers or 1, params.extract.device)
        else:
            clients = cluster.scheduler_workers(scheduler)
        with clients as client:
            yield lambda names: [
                cluster.extract_on(
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
                for name in names
            ]


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
        remarks=_stage_remarks(results)
        + tuple(
            f"{one.teacher}, {level}"
            for one in results
            for level in one.drift
        ),
    )  # fmt: skip


def _stage_remarks(results: list[ExtractSummary]) -> tuple[str, ...]:
    """Say of each pass where its time went."""
    passes: dict[int, tuple[list[str], StageTimes]] = {}
    for one in results:
        if one.stages is not None and one.images:
            names, _ = passes.setdefault(id(one.stages), ([], one.stages))
            names.append(one.teacher)
    return tuple(_stage_remark(", ".join(names), times) for names, times in passes.values())


def _stage_remark(names: str, times: StageTimes) -> str:
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in times.seconds.items())
    gpu = "" if times.gpu_hours is None else f"; {times.gpu_hours:.3f} GPU-hours"
    return (
        f"{names}: {spent}; {times.bottleneck} is the bottleneck, the teachers were at work "
        f"{times.forward_share:.0%} of {times.elapsed:.1f} s{gpu}"
    )


def _replacing(
    params: Params, names: list[str], replace: bool, extract_some: _Extract
) -> list[ExtractSummary]:
    """Extract teachers, after deleting what was written under other settings if `replace`."""
    try:
        return extract_some(names)
    except StoreMismatchError as error:
        if not replace or error.teacher is None:
            advice = f"or drop them with: sak extract-teachers {' '.join(names)} --replace"
            raise StepError(f"{error}\n{advice}") from error
        other = error.teacher
    dropped = collect_garbage(params.store, drop=[other], delete=True)
    if any(one.busy for one in dropped):
        raise StepError(f"teacher {other!r} is being written by another process; stop it first")
    return _replacing(params, names, replace, extract_some)
