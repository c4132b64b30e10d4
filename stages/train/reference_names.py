"""The reference code's names of weights, and ours.

Ours follow the published checkpoints except for the names of tasks and, in the second stage, the
prefix `backbone.` of everything but the heads.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from stages.train.reference_file import ReferenceError, listed

TASKS = {
    "semseg": "segmentation",
    "human_parts": "parts",
    "sal": "saliency",
    "normals": "normals",
    "edge": "boundary",
    "depth": "depth",
}
"""Task names of the reference code and ours."""
BACKBONE = "backbone."
HEADS = "heads."
PARTS = ("vit", "tsap", "out_norms", "ts_aligners", "mor")
_TASK = re.compile(r"(?P<before>mor\.\d+_|heads\.)(?P<task>[^.]+)(?P<after>\..+)", re.DOTALL)


def to_ours(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return the weights under our names, in the same order, and whether they are of stage two.

    Raises:
        ReferenceError: names that no SAK checkpoint has, mixed prefixes, or unknown tasks.
    """
    prefixed = [name for name in weights if name.startswith((BACKBONE, HEADS))]
    bare = [name for name in weights if not name.startswith((BACKBONE, HEADS))]
    known = tuple(f"{part}." for part in PARTS)
    if unknown := [name for name in weights if not name.removeprefix(BACKBONE).startswith(
        (*known, HEADS) if not name.startswith(BACKBONE) else known
    )]:  # fmt: skip
        raise ReferenceError(
            f"{len(unknown)} of {len(weights)} names are in no SAK checkpoint:\n{listed(unknown)}\n"
            f"expected {', '.join(known)} (all below {BACKBONE} beside {HEADS} in stage two)"
        )
    if prefixed and bare:
        raise ReferenceError(
            f"prefixes are mixed: {len(prefixed)} names as in stage two, such as {prefixed[0]}, "
            f"and {len(bare)} as in stage one, such as {bare[0]}; give one checkpoint, not a mix"
        )
    return {_ours(name.removeprefix(BACKBONE)): value for name, value in weights.items()}, not bare


def to_reference(name: str, stage_two: bool) -> str:
    """Return the reference's name of one of our weights."""
    backwards = {ours: theirs for theirs, ours in TASKS.items()}
    if found := _TASK.fullmatch(name):
        name = found["before"] + backwards.get(found["task"], found["task"]) + found["after"]
    return BACKBONE + name if stage_two and not name.startswith(HEADS) else name


def found_in(names: Iterable[str], pattern: str) -> tuple[str, ...]:
    """Return what the group of a pattern matches at the start of names, each once, in order."""
    matches = (re.match(pattern, name) for name in names)
    return tuple(dict.fromkeys(match[1] for match in matches if match))


def _ours(name: str) -> str:
    found = _TASK.fullmatch(name)
    if found is None:
        return name
    if found["task"] not in TASKS:
        raise ReferenceError(f"{name}: unknown task; the reference has {', '.join(TASKS)}")
    return found["before"] + TASKS[found["task"]] + found["after"]
