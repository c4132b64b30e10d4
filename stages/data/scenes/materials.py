"""Materials whose colour says little about the class: procedural textures in object space.

A material is one row of numbers; `albedo` evaluates a whole table of them at hit points, grouped
by pattern. Colours are drawn around named ones, so that captions can name them truthfully.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

PALETTE: Mapping[str, tuple[float, float, float]] = {
    "white": (0.86, 0.85, 0.82),
    "grey": (0.46, 0.46, 0.47),
    "black": (0.09, 0.09, 0.10),
    "red": (0.66, 0.13, 0.11),
    "orange": (0.80, 0.42, 0.10),
    "yellow": (0.82, 0.70, 0.18),
    "green": (0.18, 0.46, 0.16),
    "blue": (0.15, 0.26, 0.62),
    "purple": (0.40, 0.19, 0.48),
    "pink": (0.82, 0.48, 0.52),
    "brown": (0.38, 0.22, 0.11),
    "beige": (0.72, 0.60, 0.42),
}
SKIN = ((0.78, 0.55, 0.43), (0.62, 0.41, 0.29), (0.42, 0.26, 0.17), (0.24, 0.15, 0.10))
PATTERNS = ("plain", "striped", "checked", "mottled", "wooden", "dotted")
_WAVES = np.random.Generator(np.random.Philox(7)).normal(size=(3, 5)).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """A surface: linear colours in 0..1, `scale` cycles per metre, axis of the pattern, gloss."""

    name: str
    pattern: str
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    scale: float
    axis: tuple[float, float, float]
    phase: float
    gloss: float
    emission: float = 0.0

    def row(self) -> list[float]:
        """The numbers that `albedo` reads."""
        return [
            *self.first, *self.second, *self.axis, self.scale, self.phase, self.gloss,
            self.emission, float(PATTERNS.index(self.pattern)),
        ]  # fmt: skip


def shade_of(rng: np.random.Generator, name: str) -> tuple[float, float, float]:
    """A colour near the named one; the spread is small enough that the name stays true."""
    base = np.asarray(PALETTE[name]) * rng.uniform(0.8, 1.15) + rng.normal(0, 0.02, 3)
    red, green, blue = np.clip(base, 0.02, 0.95).tolist()
    return red, green, blue


def draw_material(
    rng: np.random.Generator,
    *,
    colours: Sequence[str] = tuple(PALETTE),
    patterns: Sequence[str] = PATTERNS,
    scale: float = 6.0,
    level: bool = False,
) -> Material:
    """A random material; `colours` and `patterns` may repeat names to make them likelier.

    A `level` surface gets a pattern that varies along it, not upwards.
    """
    name = str(rng.choice(list(colours)))
    pattern = str(rng.choice(list(patterns)))
    other = str(rng.choice([c for c in PALETTE if c != name]))
    first = shade_of(rng, name)
    blend = rng.uniform(0.35, 0.9)
    mixed = [a + (b - a) * blend for a, b in zip(first, shade_of(rng, other), strict=True)]
    second = (0.6 * first[0], 0.6 * first[1], 0.6 * first[2])
    if pattern in ("striped", "checked", "dotted"):
        second = (mixed[0], mixed[1], mixed[2])
    axis = rng.normal(size=3)
    if rng.random() < 0.7:  # mostly along a main direction, as in made things
        axis = np.eye(3)[rng.integers(2 if level else 3)]
    x, y, z = (axis / np.linalg.norm(axis)).tolist()
    return Material(
        name=name, pattern=pattern, first=first, second=second, axis=(x, y, z),
        scale=float(scale * np.exp(rng.normal(0, 0.35))), phase=float(rng.uniform(0, 6.28)),
        gloss=float(max(0.0, rng.normal(0.05, 0.15))),
    )  # fmt: skip


def plain(colour: Iterable[float], *, name: str = "plain", emission: float = 0.0) -> Material:
    """One colour everywhere; with `emission` it shines whatever the light."""
    red, green, blue = (float(c) for c in colour)
    return Material(
        name=name, pattern="plain", first=(red, green, blue), second=(red, green, blue),
        scale=1.0, axis=(0.0, 0.0, 1.0), phase=0.0, gloss=0.0, emission=emission,
    )  # fmt: skip


def material_table(materials: Sequence[Material]) -> Array:
    """One row per material, M x 14."""
    return np.array([m.row() for m in materials], np.float32)


def albedo(table: Array, index: npt.NDArray[np.int32], points: Array) -> Array:
    """Colour N x 3 of the materials `index` (N) at `points` (N x 3, metres, object frame)."""
    rows = table[index]
    mix = np.zeros(len(points), np.float32)
    kinds = rows[:, 13].astype(np.int32)
    for kind, pattern in enumerate(PATTERNS):
        here = np.flatnonzero(kinds == kind)
        if pattern != "plain" and len(here):
            mix[here] = _EVALUATORS[pattern](points[here], rows[here])
    return rows[:, :3] + (rows[:, 3:6] - rows[:, :3]) * mix[:, None]


def _along(points: Array, rows: Array) -> Array:
    result: Array = np.einsum("nc,nc->n", points, rows[:, 6:9]) * rows[:, 9] + rows[:, 10]
    return result


def _waves(points: Array, frequency: Array) -> Array:
    """Smooth noise in about -1..1: a few sines bent by one another."""
    base = (points * frequency[:, None]) @ _WAVES
    bent = np.sin(base[:, :3] * 3.1 + 2.0 * np.sin(base[:, 2:5] * 1.7)).mean(axis=1)
    result: Array = bent * np.float32(1.4)
    return result


def _striped(points: Array, rows: Array) -> Array:
    result: Array = (_along(points, rows) % 1.0 < 0.5).astype(np.float32)
    return result


def _checked(points: Array, rows: Array) -> Array:
    cells = np.floor((points + rows[:, 10:11] * 0.013) * rows[:, 9:10] * 0.8 + 1e-3)
    result: Array = (cells.sum(axis=1) % 2).astype(np.float32)
    return result


def _mottled(points: Array, rows: Array) -> Array:
    result: Array = np.clip(0.5 + 0.5 * _waves(points, rows[:, 9] * 0.7), 0, 1)
    return result


def _wooden(points: Array, rows: Array) -> Array:
    axis = rows[:, 6:9]
    across = points - np.einsum("nc,nc->n", points, axis)[:, None] * axis
    across = across + 0.37  # the heart of the trunk lies outside the board
    rings = np.linalg.norm(across, axis=1) * rows[:, 9] * 4
    rings = rings + 0.8 * _waves(points, rows[:, 9] * 0.25)
    soft: Array = (0.5 + 0.5 * np.sin(rings * 6.28)) * 0.8
    return soft


def _dotted(points: Array, rows: Array) -> Array:
    cell = np.abs((points * rows[:, 9:10] + rows[:, 10:11]) % 1.0 - 0.5)
    other = 0.5 - cell  # a second lattice between the first, so that every plane meets dots
    near = np.minimum(np.einsum("nc,nc->n", cell, cell), np.einsum("nc,nc->n", other, other))
    result: Array = (near < 0.12).astype(np.float32)
    return result


_EVALUATORS: Mapping[str, Callable[[Array, Array], Array]] = {
    "striped": _striped,
    "checked": _checked,
    "mottled": _mottled,
    "wooden": _wooden,
    "dotted": _dotted,
}
