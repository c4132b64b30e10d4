"""How far a teacher's grid follows its image when that is mirrored, cut or enlarged.

A table of figures, `cosine` (level x transform), at `<teacher>/equivariance`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from store.figures import FigureTable
from store.remote import StorePath
from store.spec import EQUIVARIANCE, TeacherSpec

TRANSFORMS = ("flip", "crop", "scale")
"""Mirrored left to right; cut at its own scale; a part enlarged."""

TABLE = FigureTable(
    folder=EQUIVARIANCE,
    array="cosine",
    axis="transform",
    columns=TRANSFORMS,
    largest=(1.0,) * len(TRANSFORMS),
    says="mean cosines, of how far features follow flips and crops",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivariance:
    """Mean cosine over tokens of the changed grid with the answer to the changed image.

    `cosine` maps a level to each transform's figure, NaN where its grid is too small to tell.
    """

    images: int
    cosine: Mapping[str, Mapping[str, float]]


def write_equivariance(folder: StorePath, spec: TeacherSpec, measured: Equivariance) -> None:
    """Place a teacher's figures; only the holder of its lock may."""
    TABLE.write(folder, spec, TABLE.rows(spec, measured.cosine), measured.images)


def read_equivariance(folder: StorePath, spec: TeacherSpec) -> Equivariance | None:
    """Return a teacher's figures, None where they were not measured.

    Raises:
        StoreDamagedError: a file is missing or damaged, or a figure is no cosine.
    """
    found = TABLE.read(folder, spec)
    return None if found is None else Equivariance(cosine=found[0], images=found[1])
