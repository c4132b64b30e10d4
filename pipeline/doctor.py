"""`sak doctor`: everything that a run needs, looked at beforehand, with what to do about it."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline.doctor_check import Check, fail, ok, warn
from pipeline.doctor_machine import check_disk, check_gpu, machine_checks
from pipeline.params import Params, ParamsError, load_params
from pipeline.plan_images import sample_images
from pipeline.report import Report
from stages.data.config import ScenesData
from stages.data.dataset import open_dataset
from stages.data.images import OK, try_images
from stages.progress import NoProgress
from store.codecs import FLOATS, parse_codec
from store.disk import bytes_there
from store.errors import StoreError, StoreLockedError
from store.files import lock_folder
from store.inspect import TeacherSummary, summarise
from store.layout import METADATA
from store.remote import StorePath, locate
from store.spec import TeacherSpec

_SAMPLE = 16
_SHOWN = 3


def diagnose(path: Path, wanted: bool) -> tuple[Report, bool]:
    """Return every check and whether none failed.

    Without a parameter file at `path` only the machine is looked at; that is a failure where the
    file was `wanted`.
    """
    checks = machine_checks()
    if path.is_file() or wanted:
        checks += _parameter_checks(path, checks)
    else:
        checks.append(warn("parameters", f"no {path} here", "only the machine was looked at"))
        checks.append(check_disk(Path.cwd() / "store", None))
    return _report(checks), all(check.state != "fail" for check in checks)


def _report(checks: list[Check]) -> Report:
    counts = {state: sum(one.state == state for one in checks) for state in ("ok", "warn", "fail")}
    return Report(
        columns=("check", "state", "found", "what to do"),
        rows=tuple((one.name, one.state, one.found, one.advice) for one in checks),
        data={"checks": [asdict(one) for one in checks], **counts},
        remarks=(f"{counts['ok']} ok, {counts['warn']} to note, {counts['fail']} failed",),
    )


def _parameter_checks(path: Path, machine: list[Check]) -> list[Check]:
    try:
        params = load_params(path)
    except ParamsError as error:
        return [fail("parameters", str(error), f"correct {path}")]
    checks = [ok("parameters", str(path))]
    place = next(index for index, check in enumerate(machine) if check.name == "gpu")
    machine[place] = check_gpu(params.extract.device)
    dataset, images = check_dataset(params)
    checks.append(dataset)
    specs, teachers = _check_teachers(params)
    checks += teachers
    try:
        store = locate(params.store)
    except StoreError as error:
        return [*checks, fail("store", str(error), "correct `store:`")]
    if isinstance(store, Path):
        whole = images is not None and len(specs) == len(params.teachers)
        rows = (images or 0) * params.views.count
        checks.append(check_disk(store, _still_needed(store, specs, rows) if whole else None))
    return [*checks, *check_store(store, params)]


def _check_teachers(params: Params) -> tuple[list[TeacherSpec], list[Check]]:
    from pipeline.doctor_weights import check_teacher

    found = [
        check_teacher(name, config, params.image_size) for name, config in params.teachers.items()
    ]
    return [spec for _, spec in found if spec is not None], [check for check, _ in found]


def check_dataset(params: Params) -> tuple[Check, int | None]:
    """Return the check of the images, some of them decoded, and how many there are."""
    data = params.data
    if isinstance(data, ScenesData) and not data.root.exists():
        return ok("images", "scenes are not rendered yet, `sak index` does"), data.train + data.val
    try:
        dataset = open_dataset(data).with_tasks(params.tasks)
    except (ValueError, OSError) as error:
        return fail("images", str(error), "correct `data:` in the parameter file"), None
    sample = sample_images(dataset.images, _SAMPLE)
    statuses = try_images(sample, NoProgress()).statuses
    bad = [f"{one.path}: {why}" for one, why in zip(sample, statuses, strict=True) if why != OK]
    found = f"{len(dataset.images)} listed, {len(sample) - len(bad)} of {len(sample)} decoded"
    if not bad:
        return ok("images", found), len(dataset.images)
    found = f"{found}; {'; '.join(bad[:_SHOWN])}"
    if len(bad) == len(sample):
        return fail("images", found, "see that the files can be read"), len(dataset.images)
    advice = "`sak index` sets bad ones aside, up to --max-bad"
    return warn("images", found, advice), len(dataset.images)


def check_store(path: StorePath, params: Params) -> list[Check]:
    """Return the checks of the store and of each teacher that the parameter file names."""
    try:
        if not (path / METADATA).exists() and not path.is_dir():
            return [ok("store", f"{path} is not there yet, `sak index` makes it")]
        summary = summarise(path)
    except StoreError as error:
        return [fail("store", str(error), "see `sak verify`, or choose another `store:`")]
    except OSError as error:
        found = f"{error.filename or path}: {error.strerror or error}"
        return [fail("store", found, "correct its permissions, or choose another `store:`")]
    size = (
        ok("store", f"{summary.images} images, {len(summary.quarantined)} quarantined")
        if summary.image_size == params.image_size
        else fail("store", f"views of {summary.image_size}, image_size is {params.image_size}",
                  "choose another `store:`, or that image size")
    )  # fmt: skip
    there = {teacher.name: teacher for teacher in summary.teachers}
    checks = [_check_written(path, name, there.get(name)) for name in params.teachers]
    return [size, *checks]


def _check_written(path: StorePath, name: str, teacher: TeacherSummary | None) -> Check:
    label, command = f"features of {name}", f"`sak extract-teachers {name}`"
    if isinstance(path, Path) and (path / name).is_dir():  # elsewhere a lock takes a write
        try:
            lock_folder(path / name).release()
        except StoreLockedError:
            return warn(label, "another process is writing them", "wait until it ends")
    if teacher is None:
        return ok(label, f"not extracted yet, {command} does")
    if teacher.finished:
        return ok(label, "finished")
    return warn(label, f"{teacher.coverage:.0%} extracted", f"{command} goes on")


def _still_needed(store: Path, specs: Iterable[TeacherSpec], rows: int) -> int:
    """Return about how many bytes are still to be written; `sak plan` knows it exactly."""
    specs = list(specs)
    total = sum(_row_bits(spec) * rows // 8 for spec in specs)
    return max(0, total - bytes_there(store, [spec.name for spec in specs]))


def _row_bits(spec: TeacherSpec) -> int:
    codec = parse_codec(spec.codec)
    bits = 8 * np.dtype(FLOATS[spec.codec]).itemsize if codec.is_float else codec.bits or 8
    values = sum(target.grid[0] * target.grid[1] * target.channels for target in spec.targets)
    return values * bits + 16 * (spec.global_channels or 0)
