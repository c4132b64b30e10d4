"""`sak inspect` and `sak teachers`: tables that need no torch."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from rich.filesize import decimal

from pipeline.params import load_params
from pipeline.report import Report
from stages.extract.known import TeacherDescription, describe_teachers
from store.inspect import StoreSummary, TeacherSummary, summarise
from store.remote import locate
from store.tables import read_images

_SHOWN = 20


def inspect(path: str) -> Report:
    """Say what a store holds."""
    summary = summarise(path)
    rows = [_level_row(teacher, index) for teacher in summary.teachers
            for index in range(len(teacher.levels))]  # fmt: skip
    return Report(
        columns=(
            "teacher", "level", "row shape", "codec", "bytes", "cosine", "1st pct",
            "flip/crop/scale", "shards", "coverage", "model",
        ),
        rows=tuple(rows),
        data=summary.to_json(),
        remarks=_store_remarks(summary),
    )  # fmt: skip


def _level_row(teacher: TeacherSummary, index: int) -> tuple[object, ...]:
    level = teacher.levels[index]
    shape = " x ".join(str(side) for side in level.shape)
    kept = level.fidelity
    cosines = ("", "") if kept is None else (f"{kept.cosine_mean:.4f}", f"{kept.cosine_p01:.4f}")
    cells: tuple[object, ...] = (
        level.name, shape, level.codec, decimal(level.bytes), *cosines,
        _follows(level.equivariance),
    )  # fmt: skip
    if index:
        return ("", *cells, "", "", "")
    coverage = f"{teacher.coverage:.0%}" + ("" if teacher.finished else " (unfinished)")
    model = teacher.provenance.get("source", "?")
    return (teacher.name, *cells, teacher.shards, coverage, model)


def _follows(equivariance: Mapping[str, float | None] | None) -> str:
    cosines = (equivariance or {}).values()
    return " ".join("-" if one is None else f"{one:.3f}" for one in cosines)


def _store_remarks(summary: StoreSummary) -> tuple[str, ...]:
    height, width = summary.image_size
    each = summary.views_per_image
    size = (
        f"{summary.images} images as {'' if each == 1 else f'{each} '}{height} x {width} views"
        f"{'' if each == 1 else ' each'}{_changes(summary)}, {decimal(summary.bytes)} on disk"
    )
    remarks = [f"{size}, format {summary.format_version}, digest {summary.digest[:16]}"]
    for teacher in summary.teachers:
        weights = str(teacher.provenance.get("weights_sha256", "?"))[:16]
        licence = teacher.provenance.get("licence") or "licence unknown"
        remarks.append(
            f"{teacher.name}: weights {weights}, {licence}, fingerprint {teacher.fingerprint[:16]}"
        )
    if any(teacher.equivariance_images for teacher in summary.teachers):
        remarks.append(
            "flip/crop/scale: mean cosine of a mirrored, cut or enlarged grid with the teacher's "
            "answer to the changed image; 1 follows it exactly"
        )
    remarks += [
        f"{teacher.name} in {teacher.provenance.get('precision')}, {level}"
        for teacher in summary.teachers
        for level in teacher.drift
    ]
    bad = [f"quarantined: {name}: {reason}" for name, reason in summary.quarantined.items()]
    more = [f"and {len(bad) - _SHOWN} more, `--quarantined` lists all"] if bad[_SHOWN:] else []
    return (*remarks, *bad[:_SHOWN], *more)


def _changes(summary: StoreSummary) -> str:
    """Say what else than crops there is among the views."""
    rows = summary.images * summary.views_per_image
    changes = [f"{summary.flipped / rows:.0%} mirrored"] if summary.flipped else []
    changes += ["colours changed"] if summary.photometric else []
    return f" ({', '.join(changes)})" if changes else ""


def quarantined(path: str) -> Report:
    """List the images of a store that could not be used, and why."""
    images = read_images(locate(path))
    bad = {
        name: status
        for name, status in zip(images.ids, images.statuses, strict=True)
        if status != "ok"
    }
    return Report(
        columns=("image", "reason"),
        rows=tuple(bad.items()),
        data={"images": len(images), "quarantined": bad},
        remarks=(f"{len(bad)} of {len(images)} images",),
    )


def teachers(path: Path) -> Report:
    """List the teachers of the parameter file, where there is one, and those known by name."""
    configured = load_params(path).teachers if path.is_file() else {}
    lines = describe_teachers(configured)
    return Report(
        columns=tuple(field.name for field in fields(TeacherDescription)),
        rows=tuple(tuple(asdict(line).values()) for line in lines),
        data={"teachers": [asdict(line) for line in lines]},
        remarks=(
            'in params.yaml, under teachers:   my_name: {source: "<source>", input_size: <input_size>}',
            "any other model of timm or open_clip works too: timm:<model>.<tag>, open_clip:<model>/<tag>",
            "so does a class of your own: custom:<module>:<Class>; try it with `sak teachers check`",
        ),
    )
