"""`sak teachers check`: one teacher, tried point by point."""

import re
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import StepError
from pipeline.params import load_params
from pipeline.report import Report
from stages.extract.check_teacher import check_teacher
from stages.extract.config import TeacherConfig
from stages.extract.provenance import network_source
from stages.extract.teachers import choose_device
from stages.progress import Progress

_VIEWS = ((224, 224), (192, 320))
_LEVELS: int = TeacherConfig.model_fields["levels"].default
_LIBRARIES = ("timm:", "open_clip:")


def check(
    teacher: str, sizes: list[str], device: str, params: Path, progress: Progress
) -> tuple[Report, bool]:
    """Return the table of all checks, and whether every one passed."""
    views = [_parse_size(size) for size in sizes] or list(_VIEWS)
    config = _config(teacher, params)
    checks = check_teacher(config, views, choose_device(device), progress)
    passed = all(one.passed for one in checks)
    failed = sum(not one.passed for one in checks)
    report = Report(
        columns=("check", "result", "what was seen"),
        rows=tuple((one.name, "ok" if one.passed else "FAILED", one.detail) for one in checks),
        data={
            "source": config.source,
            "views": views,
            "passed": passed,
            "checks": [asdict(one) for one in checks],
        },
        remarks=(f"{config.source}: " + ("all passed" if passed else f"{failed} failed"),),
    )
    return report, passed


def _config(teacher: str, params: Path) -> TeacherConfig:
    """Return the configured teacher of that name, else one for that source or class."""
    configured = load_params(params).teachers if params.is_file() else {}
    if teacher in configured:
        return configured[teacher]
    try:
        if teacher.startswith(_LIBRARIES):
            return _with_levels(TeacherConfig(source=teacher, checkpoint="random"))
        return _with_levels(TeacherConfig(source=f"custom:{teacher.removeprefix('custom:')}"))
    except ValidationError as error:
        raise StepError(
            f"{teacher!r} is neither a teacher of {params} nor a source; expected timm:<model>, "
            "open_clip:<model>/<tag>, module:Class or the name of an entry point"
        ) from error


def _with_levels(config: TeacherConfig) -> TeacherConfig:
    """Ask for all levels of a network that has fewer than the default."""
    layers = len(network_source(config).outline().reductions)
    return config.model_copy(update={"levels": layers}) if layers < _LEVELS else config


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise StepError(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 192x320")
    return int(match[1]), int(match[2])
