"""Tries a teacher: built for several sizes, checked point by point, and built in another process."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from stages.extract.config import TeacherConfig
from stages.extract.errors import UnknownTeacherError
from stages.extract.teacher_checks import CHECKS, CheckFailedError, Subject
from stages.extract.teachers import load_teacher
from stages.progress import Progress
from store.errors import difference

_NAME = "checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One point: whether it holds at every size, and what was seen."""

    name: str
    passed: bool
    detail: str


def check_teacher(
    config: TeacherConfig,
    views: Sequence[tuple[int, int]],
    device: torch.device,
    progress: Progress,
) -> list[Check]:
    """Make every check at every size of `views` (height, width) in pixels.

    Where the teacher cannot be built, that is the only check.

    Raises:
        UnknownTeacherError: no library or package has it.
    """
    progress.start("check teacher", len(views) * len(CHECKS) + 1)
    subjects = []
    for view in views:
        try:
            teacher = load_teacher(_NAME, config, view, device)
        except UnknownTeacherError:
            raise
        except (ValueError, OSError) as error:
            return [Check(name="builds", passed=False, detail=f"{_size(view)}: {error}")]
        subjects.append(Subject(teacher=teacher, view=view))
    sizes = ", ".join(map(_size, views))
    checks = [Check(name="builds", passed=True, detail=f"for views of {sizes}")]
    checks += [_make(name, subjects, progress) for name in CHECKS]
    checks.append(_build_elsewhere(config, subjects[0], device))
    progress.advance()
    return checks


def _make(name: str, subjects: Sequence[Subject], progress: Progress) -> Check:
    """Make one check at every size; the detail is of the first size, or the one that failed."""
    details = []
    for subject in subjects:
        try:
            details.append(CHECKS[name](subject))
        except CheckFailedError as error:
            return Check(name=name, passed=False, detail=f"{_size(subject.view)}: {error}")
        progress.advance(note=name)
    return Check(name=name, passed=True, detail=details[0])


def _build_elsewhere(config: TeacherConfig, subject: Subject, device: torch.device) -> Check:
    """Build the teacher in a fresh process, as workers do, and compare what it says."""
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            told = pool.submit(
                describe_teacher, config.model_dump_json(), subject.view, str(device)
            ).result()
    except (ValueError, OSError, BrokenProcessPool) as error:
        return Check(name="another process", passed=False, detail=f"cannot build it: {error}")
    lines = difference(subject.teacher.spec.to_attributes(), told)
    detail = "the same teacher" if not lines else "it differs there:\n" + "\n".join(lines)
    return Check(name="another process", passed=not lines, detail=detail)


def describe_teacher(config: str, view: tuple[int, int], device: str) -> dict[str, object]:
    """Return the description of a teacher built from its configuration as JSON."""
    teacher = load_teacher(
        _NAME, TeacherConfig.model_validate_json(config), view, torch.device(device)
    )
    return teacher.spec.to_attributes()


def _size(view: tuple[int, int]) -> str:
    return f"{view[0]} x {view[1]}"
