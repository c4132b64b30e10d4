"""What low precision cost a teacher: its features against those of the same weights in float32.

A table of figures, `figures` (level x figure), at `<teacher>/drift`; only where the teacher was
computed in low precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from store.figures import FigureTable
from store.remote import StorePath
from store.spec import DRIFT, TeacherSpec

TABLE = FigureTable(
    folder=DRIFT,
    array="figures",
    axis="figure",
    columns=("cosine_mean", "cosine_p01", "relative_l2"),
    largest=(1.0, 1.0, float("inf")),
    says="cosines and errors, of what low precision cost",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelDrift:
    """How far a level is from float32 on `tokens` tokens.

    Cosine similarity of a token with its float32 self, mean and 1st percentile; norm of the
    difference of all tokens over the norm of all of them.
    """

    level: str
    tokens: int
    cosine_mean: float
    cosine_p01: float
    relative_l2: float

    def __str__(self) -> str:
        return (
            f"{self.level}: against fp32 on {self.tokens} tokens, cosine mean "
            f"{self.cosine_mean:.6f}, 1st percentile {self.cosine_p01:.6f}, relative L2 "
            f"{self.relative_l2:.2g}"
        )


def write_drift(
    folder: StorePath, spec: TeacherSpec, drift: Sequence[LevelDrift], images: int
) -> None:
    """Place what was measured of every level; only the holder of the teacher's lock may."""
    figures = TABLE.rows(
        spec, {one.level: {name: getattr(one, name) for name in TABLE.columns} for one in drift}
    )
    TABLE.write(folder, spec, figures, images)


def read_drift(folder: StorePath, spec: TeacherSpec) -> tuple[LevelDrift, ...]:
    """Return a teacher's drift by level, nothing where it was not measured.

    Raises:
        StoreDamagedError: a file is missing or damaged, or a figure cannot be.
    """
    found = TABLE.read(folder, spec)
    if found is None:
        return ()
    figures, images = found
    return tuple(
        LevelDrift(
            level=level.name, tokens=images * level.grid[0] * level.grid[1], **figures[level.name]
        )
        for level in spec.levels
    )
