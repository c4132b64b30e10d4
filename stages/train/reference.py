"""Checkpoints of the reference code (innovator-zero/SAK) to our students and back, strictly."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.train.files import write_atomically
from stages.train.reference_file import MODEL, ReferenceError, listed, read_weights
from stages.train.reference_infer import Unstated, infer
from stages.train.reference_names import to_ours, to_reference
from stages.train.saving import DESCRIPTION, StudentDescription, load_student, save_student
from stages.train.student import Student


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was in a checkpoint, and what was not taken from it."""

    stage: int
    """1: stem and paths; 2: with routers and heads."""
    stem: str
    image_size: tuple[int, int]
    teachers: dict[str, tuple[int, ...]]
    """Channels per level."""
    levels: tuple[int, ...]
    """Zero-based tapped blocks."""
    tasks: dict[str, int]
    """Channels per task."""
    router: str
    aligners: bool
    parameters: dict[str, int]
    used: int
    """Weights taken over: all that the file's model holds."""
    left_out: tuple[str, ...]
    """Other entries of the file, such as `optimizer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What a file in the reference's layout holds."""

    stage: int
    weights: int
    bytes: int


def import_reference(file: Path, folder: Path, unstated: Unstated | None = None) -> Imported:
    """Turn a checkpoint of the reference into a student folder, as training saves it.

    Raises:
        ReferenceError: an unusable file, or weights that are no SAK student to the last name.
        StudentError: a student that cannot be built.
    """
    if (folder / DESCRIPTION).exists():
        raise ReferenceError(f"{folder} holds a student already; choose another folder")
    theirs, left_out = read_weights(file)
    weights, stage_two = to_ours(theirs)
    ordered = file.suffix != ".safetensors"
    description = infer(weights, unstated or Unstated(), ordered)
    student = _fitting(description, weights, stage_two)
    student.load_state_dict(weights, assign=True)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    origin = {"imported": {"file": file.name, "sha256": digest, "format": "reference"}}
    save_student(folder, student, description, origin)
    return Imported(
        stage=2 if stage_two else 1,
        stem=f"{description.student.model} {description.student.model_args or ''}".strip(),
        image_size=description.image_size,
        teachers=description.teachers,
        levels=student.levels,
        tasks={task.name: task.channels for task in description.tasks},
        router=description.student.router if description.tasks else "none",
        aligners=description.aligners,
        parameters=student.parameter_counts(),
        used=len(weights),
        left_out=left_out,
    )


def export_reference(folder: Path, file: Path) -> Exported:
    """Write a trained student as the reference saves one, `{"model": weights}`.

    Raises:
        ReferenceError: the reference has no such student, or the file exists.
        StudentError: no finished run there.
    """
    if file.exists():
        raise ReferenceError(f"{file} exists; choose another file")
    student = load_student(folder)
    weights = {name: value.contiguous() for name, value in student.state_dict().items()}
    stage_two = len(student.heads) > 0
    unstated = Unstated(
        image_size=student.image_size,
        heads=student.vit.get_submodule("blocks.0.attn").num_heads,  # type: ignore[arg-type]
        teachers=student.teachers,
    )
    try:
        _fitting(infer(weights, unstated, ordered=True), weights, stage_two)
    except ReferenceError as error:
        raise ReferenceError(f"the reference has no student as in {folder}: {error}") from error
    theirs = {to_reference(name, stage_two): value for name, value in weights.items()}
    write_atomically(file, lambda path: torch.save({MODEL: theirs}, path))
    return Exported(stage=2 if stage_two else 1, weights=len(theirs), bytes=file.stat().st_size)


def _fitting(
    description: StudentDescription, weights: Mapping[str, Tensor], stage_two: bool
) -> Student:
    """Build the student without memory, refusing any difference in names or shapes.

    Raises:
        ReferenceError: with all kinds of differences, in the reference's names.
    """
    with torch.device("meta"):
        student = description.build()
    wanted = student.state_dict()
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    misshapen = [
        f"{to_reference(name, stage_two)}: {tuple(weights[name].shape)}, expected "
        f"{tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    faults = []
    for label, names in (("missing", missing), ("of no part of this student", unknown)):
        if names:
            lines = listed([to_reference(name, stage_two) for name in names])
            faults.append(f"{len(names)} {label}:\n{lines}")
    if misshapen:
        faults.append(f"{len(misshapen)} with shapes that do not fit:\n{listed(misshapen)}")
    if faults:
        raise ReferenceError("weights of another student than SAK's:\n" + "\n".join(faults))
    return student
