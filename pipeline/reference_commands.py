"""`sak import-checkpoint` and `sak export`: published checkpoints in, students out."""

import dataclasses
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline import console
from pipeline.options import AsJson
from pipeline.report import two_columns


class ExportFormat(StrEnum):
    """Layouts that a student can be written in."""

    REFERENCE = "reference"


def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="checkpoint.pth, a state dict, or safetensors.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the student, such as runs/distill.")],
    image_size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH, where the stem's grid is not square.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, where not of 64 channels.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="Teachers in the order of the routers' gates; for safetensors."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint of the published SAK code into a student, every weight or none."""
    from stages.train.reference import import_reference
    from stages.train.reference_infer import Unstated

    unstated = Unstated(
        image_size=None if image_size is None else _size(image_size),
        heads=heads,
        teachers=tuple(teacher) if teacher else None,
    )
    result = import_reference(file, folder, unstated)
    console.show(f"imported {file.name}", two_columns(dataclasses.asdict(result)), as_json)


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    file: Annotated[Path, typer.Argument(help="File to write, such as checkpoint.pth.")],
    layout: Annotated[
        ExportFormat, typer.Option("--format", help="Layout of the file.")
    ] = ExportFormat.REFERENCE,
    as_json: AsJson = False,
) -> None:
    """Write a student as the published SAK code saves and loads it."""
    from stages.train.reference import export_reference

    result = export_reference(run, file)
    console.show(f"exported, {layout}", two_columns(dataclasses.asdict(result)), as_json)


def add_to(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(
        "import-checkpoint",
        epilog="Example: sak import-checkpoint checkpoint.pth artifacts/nyud/runs/multitask "
        "--image-size 448x576",
    )(import_checkpoint)
    app.command(epilog="Example: sak export --format reference runs/multitask checkpoint.pth")(
        export
    )


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise typer.BadParameter(f"--image-size is HEIGHTxWIDTH such as 448x576, got {text}")
    return int(found[1]), int(found[2])
