"""The last tables of `sak plan`: the parameter file as a whole, and what a budget buys."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml
from rich.filesize import decimal

from pipeline.errors import StepError
from pipeline.plan_budget import Option, choose, smallest
from pipeline.plan_costs import Comparison, duration
from pipeline.plan_survey import PlanRequest, Survey
from pipeline.report import Report
from store.sizes import Size


def total_report(survey: Survey, request: PlanRequest) -> Report:
    """Lay out bytes, files, room, time, money and the break-even epoch of the parameter file."""
    size = survey.total()
    seconds = sum(survey.seconds(name) for name in survey.costs)
    prices = _prices(request, size, seconds)
    comparison = survey.comparison(request.epochs)
    values: dict[str, Any] = {
        "images": f"{survey.images:,}",
        **(
            {"views": f"{survey.params.views.count} per image"}
            if survey.rows > survey.images
            else {}
        ),
        "store": f"{decimal(size.bytes)} in {size.files:,} files",
        **_disk_lines(survey, size.bytes),
        "extraction": f"{duration(seconds)}, held up by {_slowest(survey)}",
        **_together_line(survey, seconds),
        **{name: f"{price:,.2f}" for name, price in prices.items()},
        **_comparison_lines(comparison),
    }
    data = {
        "images": survey.images,
        "views_per_image": survey.params.views.count,
        **asdict(size),
        "already_there_bytes": survey.there,
        "fits": survey.fits(size.bytes),
        "disk": None if survey.disk is None else asdict(survey.disk),
        "seconds": seconds,
        "bottleneck": _slowest(survey),
        "together_seconds": survey.together(),
        "prices": prices,
        "comparison": None if comparison is None else comparison.to_json(),
    }
    remark = (
        "break even: online teachers cost a forward pass per image and epoch; the store one "
        "extraction, then per epoch reading and decoding the finest grid of each level by one "
        "process. The student's own work and images are left out of both"
    )
    return Report(
        columns=("what", "value"), rows=tuple(values.items()), data=data, remarks=(remark,)
    )


def _disk_lines(survey: Survey, needed: int) -> dict[str, str]:
    disk = survey.disk
    if disk is None:
        return {"room": "not measured on object storage, nor the time to upload and to read"}
    there = f", {decimal(survey.there)} of it is there already" if survey.there else ""
    verdict = "it fits" if survey.fits(needed) else "IT DOES NOT FIT"
    return {
        "free disk": f"{decimal(disk.free_bytes)}: {verdict}{there}",
        "disk speed": f"writes {decimal(int(disk.write_rate))}/s until durable, "
        f"reads {decimal(int(disk.read_rate))}/s",
    }


def _together_line(survey: Survey, seconds: float) -> dict[str, str]:
    if len(survey.costs) == 1:
        return {}
    together = survey.together()
    advice = "worth it if all teachers fit into memory" if together < 0.95 * seconds else "no gain"
    return {"in one pass": f"{duration(together)} with `sak extract-teachers --together`: {advice}"}


def _slowest(survey: Survey) -> str:
    """Return the step that bounds the teacher that takes longest."""
    name = max(survey.costs, key=survey.seconds)
    return f"{survey.pace(name).bottleneck} of {name}"


def _prices(request: PlanRequest, size: Size, seconds: float) -> dict[str, float]:
    found = {}
    if request.price_per_gb_month is not None:
        found["price of a month's storage"] = size.bytes / 1e9 * request.price_per_gb_month
    if request.price_per_hour is not None:
        found["price of the extraction"] = seconds / 3600 * request.price_per_hour
    return found


def _comparison_lines(comparison: Comparison | None) -> dict[str, str]:
    if comparison is None:
        return {"break even": "not known: reading from object storage is not measured"}
    epoch = comparison.break_even
    when = "never: reading takes longer than the teachers" if epoch is None else f"epoch {epoch}"
    return {
        "an epoch of targets": f"{duration(comparison.cached)} from the store, "
        f"{duration(comparison.online)} from online teachers",
        "break even": when,
        f"after {comparison.epochs:.3g} epochs": f"{duration(comparison.cached_total)} with the "
        f"store, {duration(comparison.online_total)} with online teachers",
    }


def budget_report(survey: Survey, budget: int) -> Report:
    """Choose codec and resolution of each teacher within `budget` bytes.

    Raises:
        StepError: nothing that meets the contract is as small.
    """
    options = {name: survey.options(name) for name in survey.costs}
    chosen = choose(options, budget - survey.tables.bytes)
    if chosen is None:
        least = smallest(options) + survey.tables.bytes
        raise StepError(
            f"nothing that meets the contract fits --budget {decimal(budget)}: the smallest is "
            f"{decimal(least)}; give more, or use fewer images, levels or teachers"
        )
    grids = {name: survey.resolutions(name, one.limit) for name, one in chosen.items()}
    total = sum(one.bytes for one in chosen.values()) + survey.tables.bytes
    return Report(
        columns=("teacher", "codec", "resolutions", "in all", "cosine lost"),
        rows=tuple(
            (name, one.codec, _shown(grids[name]), decimal(one.bytes), one.loss)
            for name, one in chosen.items()
        ),
        data={
            "budget": budget,
            "bytes": total,
            "fits": survey.fits(total),
            "teachers": {
                name: {"codec": one.codec, "resolutions": grids[name], "bytes": one.bytes,
                       "cosine_lost": one.loss}
                for name, one in chosen.items()
            },
        },
        remarks=(
            f"together {decimal(total)} of {decimal(budget)}"
            + ("" if survey.fits(total) else ", WHICH DOES NOT FIT THE DISK"),
            ("cosine lost: of the worst level, by its codec and by a grid coarser than the "
            f"student's own ({_shown([list(survey.student_grid)])}); a finer one gains nothing, "
            "for the student cannot follow it"),
            "put into the parameter file:",
            *_lines(chosen, grids),
        ),
    )  # fmt: skip


def _shown(grids: list[Any]) -> str:
    return ", ".join(grid if isinstance(grid, str) else f"{grid[0]}x{grid[1]}" for grid in grids)


def _lines(chosen: Mapping[str, Option], grids: Mapping[str, list[Any]]) -> list[str]:
    lines = ["teachers:"]
    for name, one in chosen.items():
        listed = yaml.safe_dump(grids[name], default_flow_style=True).strip()
        lines += [f"  {name}:", f"    codec: {one.codec}", f"    resolutions: {listed}"]
    return lines
