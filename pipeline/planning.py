"""`sak plan`: measures each teacher on a few images and says what a full extraction would take."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.params import Params
from pipeline.plan_images import listed_table, planned_dataset, sample_images
from pipeline.plan_survey import PlanRequest, Survey, grid_limits
from pipeline.plan_tables import codec_report, pace_report
from pipeline.plan_totals import budget_report, total_report
from pipeline.report import Report
from stages.data.config import ViewsConfig
from stages.data.images import index_images
from stages.data.views import draw_views
from stages.extract.measure import MeasureSettings, measure_teacher
from stages.extract.reading import RowReader
from stages.extract.teachers import choose_device, load_teacher
from stages.progress import Progress
from stages.train.config import StudentConfig
from stages.train.stem import create_stem
from store.disk import bytes_there, measure_disk
from store.remote import locate
from store.sizes import tables_size
from store.spec import Grid

LADDER = ("float32", "float16", "int8", "pca-6bit", "pca-4bit", "pca-3bit", "pca-2bit")
DISK_BYTES = 256 * 2**20
_MAX_BAD = 0.5  # of the sample; `sak index` holds the whole set to the parameter file's share


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Tables with their titles, each with the whole plan as JSON, and whether the disk has room."""

    tables: tuple[tuple[str, Report], ...]
    fits: bool


def plan(params: Params, request: PlanRequest, progress: Progress) -> Plan:
    """Measure, and say what extraction takes: bytes, files, time, money, and whether it fits.

    What has to fit the disk is what the budget buys where there is one, else what is asked for.

    Raises:
        StepError: no way to store the teachers that meets the contract fits the budget.
        SourceError, ImageError, TeacherError, StoreError: as indexing and extraction would.
    """
    found = survey(params, request, progress)
    tables = {
        "codecs": codec_report(found),
        "pace, images per second": pace_report(found),
        "plan": total_report(found, request),
    }
    if request.budget is not None:
        tables["budget"] = budget_report(found, request.budget)
    data = {title.partition(",")[0]: report.data for title, report in tables.items()}
    return Plan(
        tables=tuple((title, replace(report, data=data)) for title, report in tables.items()),
        fits=list(tables.values())[-1].data["fits"],
    )


def survey(params: Params, request: PlanRequest, progress: Progress) -> Survey:
    """Load every teacher, measure it on some images, and measure the store's disk.

    Changes nothing on disk: what it writes there to measure is removed again.

    Raises:
        SourceError, ImageError, TeacherError, StoreError: as indexing and extraction would.
    """
    device = choose_device(params.extract.device)
    store = locate(params.store)
    grid = student_grid(params.student, params.image_size)
    limits = (None,) if request.budget is None else grid_limits(grid)
    with planned_dataset(params, request.measure_images) as (dataset, count):
        sample = sample_images(dataset.images, request.measure_images)
        table = index_images(sample, _MAX_BAD, progress)
        costs = {}
        for name in params.teachers:
            teacher = load_teacher(name, params.teachers[name], params.image_size, device)
            rows = RowReader(
                teacher=teacher,
                images=table,
                views=draw_views(table, params.image_size, ViewsConfig()),
                paths={image.id: image.path for image in sample},
            )
            settings = MeasureSettings(
                batch_size=params.extract.sample_batch_size,
                codecs=tuple(dict.fromkeys([*LADDER, params.teachers[name].codec])),
                limits=limits,
                student_grid=grid,
                scratch=store,
                covariance=params.extract.covariance,
            )
            costs[name] = measure_teacher(rows, settings, progress)
        images = request.images or count
        tables = tables_size(
            listed_table(dataset),
            images,
            params.image_size,
            views_per_image=params.views.count,
            photometric=params.views.photometric is not None,
        )
    return Survey(
        params=params,
        costs=costs,
        images=images,
        tables=tables,
        disk=measure_disk(store, DISK_BYTES) if isinstance(store, Path) else None,
        there=bytes_there(store, list(costs)) if isinstance(store, Path) else 0,
        device=device.type,
        student_grid=grid,
        limits=limits,
    )


def student_grid(config: StudentConfig, image_size: tuple[int, int]) -> Grid:
    """Return the (rows, columns) of the student's tokens; no weight is made."""
    with torch.device("meta"):
        stem = create_stem(
            config.model_copy(update={"pretrained": False, "checkpoint": None}), image_size
        )
    rows, columns = stem.patch_embed.grid_size
    return int(rows), int(columns)
