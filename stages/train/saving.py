"""A trained student on disk: `student.safetensors` and, in `student.json`, what it is."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from stages.data.tasks import Task
from stages.train.config import StudentConfig
from stages.train.files import write_atomically
from stages.train.stem import StudentError, normalisation
from stages.train.student import Student, build_student

WEIGHTS = "student.safetensors"
DESCRIPTION = "student.json"
FORMAT = 1
CARRIED = ("vit.", "tsap.", "out_norms.", "ts_aligners.")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentDescription:
    """All that is needed to build a student again."""

    student: StudentConfig
    image_size: tuple[int, int]
    teachers: dict[str, tuple[int, ...]]
    """Channels of each level, per teacher."""
    tasks: tuple[Task, ...]
    aligners: bool

    def build(self) -> Student:
        """Build it with the starting weights that its configuration names."""
        return build_student(
            self.student, self.image_size, self.teachers, self.tasks, aligners=self.aligners
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "student": self.student.model_dump(mode="json", exclude=self._left_to_timm()),
            "image_size": list(self.image_size),
            "teachers": {name: list(channels) for name, channels in self.teachers.items()},
            "tasks": [asdict(task) for task in self.tasks],
            "aligners": self.aligners,
        }

    def _left_to_timm(self) -> set[str]:
        """Settings that are not told when unset: runs from before they existed go on."""
        return {name for name in ("mean", "std") if getattr(self.student, name) is None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StudentDescription":
        """Return what `to_json` wrote; starting weights are dropped, the trained ones follow."""
        started_empty = {**values["student"], "pretrained": False, "checkpoint": None}
        height, width = values["image_size"]
        return cls(
            student=StudentConfig.model_validate(started_empty),
            image_size=(height, width),
            teachers={name: tuple(channels) for name, channels in values["teachers"].items()},
            tasks=tuple(Task(**task) for task in values["tasks"]),
            aligners=values["aligners"],
        )


def save_student(
    folder: Path, student: Student, description: StudentDescription, run: Mapping[str, Any]
) -> None:
    """Write weights and description; `run` is JSON about how it was trained."""
    weights = {name: tensor.contiguous().cpu() for name, tensor in student.state_dict().items()}
    values = {
        "format": FORMAT,
        **description.to_json(),
        "parameters": student.parameter_counts(),
        "run": dict(run),
    }
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(folder / WEIGHTS, lambda path: save_file(weights, path))
    write_atomically(folder / DESCRIPTION, lambda path: _write_text(path, text))


def load_student(folder: Path) -> Student:
    """Build the student of a finished run and load its weights, in eval mode.

    Raises:
        StudentError: no finished run there, or files that do not belong together.
    """
    student = _read_description(folder).build()
    weights = _read_weights(folder)
    _check_fit(folder, _shapes(weights), _shapes(student.state_dict()))
    student.load_state_dict(weights)
    return student.eval()


def initialise_from(student: Student, folder: Path) -> tuple[str, ...]:
    """Start stem, paths, norms and aligners from another run; return the parts left random.

    Everything must fit by name and shape. Position embeddings of another image size are resized
    as the published code does (bicubic, no antialiasing); a student without aligners leaves those
    of the run behind.

    Raises:
        StudentError: no finished run there, or a student of another make.
    """
    source = {k: v for k, v in _read_weights(folder).items() if k.startswith(CARRIED)}
    if not student.ts_aligners:
        source = {k: v for k, v in source.items() if not k.startswith("ts_aligners.")}
    origin = _read_description(folder)
    if normalisation(origin.student) != (student.mean, student.std):
        raise StudentError(
            f"the student in {folder} saw images normalised with mean and std "
            f"{normalisation(origin.student)}, this one {(student.mean, student.std)}; set "
            "student.mean and student.std alike in both runs"
        )
    size = origin.image_size
    if size != student.image_size and "vit.pos_embed" in source:
        source["vit.pos_embed"] = _resized(source["vit.pos_embed"], size, student)
    target = {k: v for k, v in student.state_dict().items() if k.startswith(CARRIED)}
    _check_fit(folder, _shapes(source), _shapes(target))
    student.load_state_dict(source, strict=False)
    counts = student.parameter_counts()
    left_random = tuple(part for part in ("routers", "heads") if counts[part])
    logger.info("started from %s; left random: %s", folder, ", ".join(left_random) or "nothing")
    return left_random


def _resized(embedding: Tensor, size: tuple[int, int], student: Student) -> Tensor:
    patch = student.vit.patch_embed.patch_size
    resized: Tensor = resample_abs_pos_embed(
        embedding,
        new_size=list(student.vit.patch_embed.grid_size),
        old_size=[side // step for side, step in zip(size, patch, strict=True)],
        num_prefix_tokens=0 if student.vit.no_embed_class else student.vit.num_prefix_tokens,
        antialias=False,
    )
    return resized


def _read_description(folder: Path) -> StudentDescription:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise StudentError(f"{folder} holds no trained student ({DESCRIPTION}); finish its run")
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise StudentError(f"{path} is of format {values['format']}, expected {FORMAT}")
        return StudentDescription.from_json(values)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise StudentError(f"{path} is damaged ({error!r}); train this run again") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise StudentError(f"{folder} holds no trained student ({WEIGHTS}); finish its run")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise StudentError(f"{path} cannot be read ({error}); train the student again") from error


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _check_fit(
    folder: Path, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]
) -> None:
    """Refuse weights that differ from the student in any name or shape."""
    lines = [
        f"{name}: {found.get(name, 'absent')} there, {wanted.get(name, 'absent')} in this student"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if lines:
        shown = "\n  ".join(lines[:10])
        raise StudentError(
            f"the weights in {folder} are of another student ({len(lines)} differences; the "
            f"first ones):\n  {shown}\nUse the same student, levels and teachers in both runs"
        )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
