"""`sak verify`: is every byte of a store what was written, and does it look like features?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.filesize import decimal

from pipeline.errors import StepError
from pipeline.params import Params
from pipeline.report import Report
from stages.progress import Progress
from store.findings import CHECKS, Finding, Verification
from store.remote import StorePath
from store.verify import repair, verify

_SHOWN = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """Ask for `sample` rows of each teacher to be computed again as `params` says."""

    params: Params
    sample: int


def verify_store(
    path: str | StorePath,
    teachers: Sequence[str],
    quick: bool,
    mend: bool,
    live: LiveRequest | None,
    progress: Progress,
) -> tuple[Report, bool]:
    """Check a store; return the table and whether it is clean, before any repair (`mend`)."""
    found = verify(path, teachers, quick=quick, meter=progress)
    compared = [] if live is None else _compare_live(path, teachers, live, found, progress)
    repaired = repair(path, found) if mend else []
    return _report(found, compared, repaired), found.clean


def _compare_live(
    path: str | StorePath,
    names: Sequence[str],
    live: LiveRequest,
    found: Verification,
    progress: Progress,
) -> list[dict[str, Any]]:
    from stages.data.dataset import open_dataset
    from stages.extract.live import check_live
    from store.reader import FeatureStore

    params = live.params
    unknown = [name for name in names if name not in params.teachers]
    if unknown:
        raise StepError(
            f"no teacher named {', '.join(unknown)} in the parameter file; "
            f"it has {', '.join(params.teachers)}"
        )
    if any(finding.severity == "damage" for finding in found.findings):
        found.add("remark", "live", "nothing was computed again: mend the damage first")
        return []
    finished = FeatureStore(path).teachers
    images = open_dataset(params.data).images
    compared = []
    for name in names or finished:
        if name not in finished or name not in params.teachers:
            why = "it is not finished" if name not in finished else "the parameter file has it not"
            found.add("remark", "live", f"not computed again: {why}", teacher=name)
            continue
        compared += check_live(
            path, images, params.image_size, name, params.teachers[name], params.extract,
            live.sample, found, progress,
        )  # fmt: skip
    return [asdict(one) for one in compared]


def _report(found: Verification, live: list[dict[str, Any]], repaired: list[str]) -> Report:
    scopes = found.scopes()
    made = [check for check in CHECKS if any((scope, check) in found.performed for scope in scopes)]
    return Report(
        columns=("check", *scopes),
        rows=tuple((check, *(_cell(found, scope, check) for scope in scopes)) for check in made),
        data={**found.to_json(), "live": live, "repaired": repaired},
        remarks=(
            *_findings(found),
            *repaired,
            *_feature_lines(found),
            *_live_lines(live),
            _summary(found),
        ),
    )


def _cell(found: Verification, scope: str, check: str) -> str | None:
    if (scope, check) not in found.performed:
        return None
    count = found.count(scope, check)
    return f"{count} finding{'s' if count > 1 else ''}" if count else "ok"


def _findings(found: Verification) -> list[str]:
    order = ("damage", "suspect", "remark")
    ranked = sorted(found.findings, key=lambda finding: order.index(finding.severity))
    lines = [_line(finding) for finding in ranked[:_SHOWN]]
    if len(ranked) > _SHOWN:
        lines.append(f"... and {len(ranked) - _SHOWN} more; --json has all of them")
    return lines


def _line(finding: Finding) -> str:
    mend = f"; {finding.mend}" if finding.mend else ""
    return f"{finding.severity}: {finding.where()}: {finding.what}{mend}"


def _feature_lines(found: Verification) -> list[str]:
    return [
        f"features: {one.teacher}, {one.level}: {one.rows} rows, RMS {one.rms:.4g}, peak "
        f"{one.peak:.3g} x in channel {one.peak_channel}, strongest channel {one.top_share:.1%} of "
        f"the energy, {len(one.dead_channels)} of {one.channels} channels dead, "
        f"{one.outliers} outliers"
        for one in found.numbers
    ]


def _live_lines(live: list[dict[str, Any]]) -> list[str]:
    return [
        f"live: {one['teacher']}, {one['level']}: {one['rows']} rows, cosine mean "
        f"{one['cosine_mean']:.7f}, minimum {one['cosine_min']:.7f}, relative L2 "
        f"{one['relative_l2']:.2g}"
        for one in live
    ]


def _summary(found: Verification) -> str:
    wrong = sum(finding.severity != "remark" for finding in found.findings)
    verdict = "clean" if found.clean else f"{wrong} finding{'s' if wrong > 1 else ''}"
    if not found.bytes_read:
        return f"{verdict}; feature files were not read"
    rate = found.bytes_read / 1e6 / max(found.seconds, 1e-9)
    return f"{verdict}; {decimal(found.bytes_read)} read in {found.seconds:.1f} s, {rate:,.0f} MB/s"
