"""Furniture: each class has a builder that draws one textured model of it.

A model stands on the plane z = 0 of its own frame, centred, its front towards +y.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stages.data.scenes.materials import PATTERNS, Material, draw_material, plain, shade_of
from stages.data.scenes.shapes import Number, Solid, box, rod

Point = tuple[Number, Number, float]
WOODY = (*PATTERNS, "wooden", "wooden", "wooden", "plain")
WOOD_COLOURS = (
    "brown",
    "brown",
    "beige",
    "beige",
    "white",
    "grey",
    "black",
    "red",
    "blue",
    "green",
)
CLOTH = ("plain", "plain", "striped", "checked", "mottled", "dotted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One object in its own frame: solids, half extents of its footprint, and what it offers."""

    kind: str
    solids: tuple[Solid, ...]
    half: tuple[float, float]
    colour: str
    pattern: str
    seats: tuple[Point, ...] = ()
    """Where a person can sit, facing +y: the point under the hips, on the seat."""
    top: Point | None = None
    """Half extents and height of a surface that small things can stand on."""
    pose: str = ""


def build(kind: str, rng: np.random.Generator) -> Model:
    """Draw one model of a furniture class; `kind` is a key of `BUILDERS`."""
    return BUILDERS[kind](rng)


def model(
    kind: str,
    main: Material,
    solids: Sequence[Solid],
    half: tuple[float, float],
    *,
    seats: Sequence[Point] = (),
    top: Point | None = None,
    pose: str = "",
) -> Model:
    """A model described by its main material."""
    return Model(
        kind=kind, solids=tuple(solids), half=half, colour=main.name, pattern=main.pattern,
        seats=tuple(seats), top=top, pose=pose,
    )  # fmt: skip


def _wood(rng: np.random.Generator) -> Material:
    return draw_material(rng, colours=WOOD_COLOURS, patterns=WOODY, scale=7.0)


def _cloth(rng: np.random.Generator) -> Material:
    return draw_material(rng, patterns=CLOTH, scale=7.0)


def _legs(
    rng: np.random.Generator, half: tuple[float, float], height: float, material: Material
) -> list[Solid]:
    thickness = float(rng.uniform(0.02, 0.04))
    inset = thickness + 0.01
    corners = [(sx * (half[0] - inset), sy * (half[1] - inset)) for sx in (-1, 1) for sy in (-1, 1)]
    if rng.random() < 0.5:
        return [rod((x, y, 0), (x, y, height), thickness, material) for x, y in corners]
    size = (1.7 * thickness, 1.7 * thickness, height)
    return [box((x, y, height / 2), size, material) for x, y in corners]


def _table(rng: np.random.Generator) -> Model:
    hx, hy = float(rng.uniform(0.4, 0.85)), float(rng.uniform(0.32, 0.5))
    height, thick = float(rng.choice([0.42, 0.72, 0.76])), float(rng.uniform(0.025, 0.06))
    main, second = _wood(rng), _wood(rng)
    frame = main if rng.random() < 0.5 else second
    if rng.random() < 0.3:
        radius = float(rng.uniform(0.4, 0.6))
        solids = [
            rod((0, 0, height - thick), (0, 0, height), radius, main),
            rod((0, 0, 0.03), (0, 0, height - thick), 0.045, frame),
            rod((0, 0, 0), (0, 0, 0.03), 0.28, frame),
        ]
        return model(
            "table", main, solids, (radius, radius), top=(0.6 * radius, 0.6 * radius, height)
        )
    solids = [
        box((0, 0, height - thick / 2), (2 * hx, 2 * hy, thick), main),
        *_legs(rng, (hx, hy), height - thick, frame),
    ]
    if rng.random() < 0.4:
        solids.append(box((0, 0, 0.4 * height), (1.9 * hx, 1.8 * hy, 0.02), frame))
    return model("table", main, solids, (hx, hy), top=(0.85 * hx, 0.8 * hy, height))


def _chair(rng: np.random.Generator) -> Model:
    half = float(rng.uniform(0.2, 0.25))
    seat, back = float(rng.uniform(0.42, 0.48)), float(rng.uniform(0.82, 1.0))
    main = _wood(rng) if rng.random() < 0.6 else _cloth(rng)
    frame = main if rng.random() < 0.6 else _wood(rng)
    solids = [
        box((0, 0, seat - 0.025), (2 * half, 2 * half, 0.05), main),
        *_legs(rng, (half, half), seat - 0.05, frame),
    ]
    y = -half + 0.02
    if rng.random() < 0.5:
        middle, size = (seat + back) / 2 + 0.06, back - seat - 0.12
        solids.append(box((0, y, middle), (2 * half, 0.03, size), main))
        solids += [
            box((x, y, (seat + back) / 2), (0.03, 0.03, back - seat), frame)
            for x in (-half + 0.04, half - 0.04)
        ]
    else:
        solids += [
            box((x, y, (seat + back) / 2), (0.035, 0.03, back - seat), frame)
            for x in np.linspace(-half + 0.02, half - 0.02, int(rng.integers(3, 6)))
        ]
        solids.append(box((0, y, back), (2 * half, 0.035, 0.08), main))
    return model("chair", main, solids, (half, half), seats=[(0, 0, seat)])


def _sofa(rng: np.random.Generator) -> Model:
    hx, hy = float(rng.uniform(0.6, 1.05)), float(rng.uniform(0.4, 0.48))
    seat, back, arm = float(rng.uniform(0.38, 0.45)), float(rng.uniform(0.75, 0.95)), 0.17
    main = _cloth(rng)
    cushion = main if rng.random() < 0.5 else _cloth(rng)
    inner = hx - arm
    count = 1 if inner < 0.5 else int(rng.integers(2, 4))
    wide = 2 * inner / count
    solids = [
        box((0, 0, 0.5 * seat - 0.03), (2 * hx, 2 * hy, seat - 0.14), main),
        box((0, -hy + 0.1, (0.1 + back) / 2), (2 * hx, 0.2, back - 0.1), main),
    ]
    for side in (-1, 1):
        x = side * (hx - arm / 2)
        solids.append(box((x, 0, 0.34), (arm, 2 * hy, 0.5), main))
        solids.append(rod((x, -hy, 0.59), (x, hy, 0.59), arm / 2, main))
        solids += [box((x, y, 0.045), (0.06, 0.06, 0.09), cushion) for y in (-hy + 0.06, hy - 0.06)]
    spots = [-inner + wide * (i + 0.5) for i in range(count)]
    for x in spots:
        solids.append(box((x, 0.09, seat - 0.06), (wide - 0.02, 2 * hy - 0.2, 0.12), cushion))
        solids.append(box((x, -hy + 0.25, seat + 0.2), (wide - 0.03, 0.12, 0.38), cushion))
    return model("sofa", main, solids, (hx, hy), seats=[(x, 0.1, seat) for x in spots])


def _bed(rng: np.random.Generator) -> Model:
    hx, hy = float(rng.uniform(0.45, 0.85)), float(rng.uniform(0.95, 1.05))
    height = float(rng.uniform(0.42, 0.6))
    main, frame = _cloth(rng), _wood(rng)
    sheet, pillow = _cloth(rng), _cloth(rng)
    solids = [
        box((0, 0, 0.16), (2 * hx, 2 * hy, 0.2), frame),
        box((0, 0, (height + 0.26) / 2), (2 * hx - 0.06, 2 * hy - 0.06, height - 0.26), sheet),
        box((0, 0.32 * hy, (height + 0.25) / 2), (2 * hx, 1.34 * hy, height - 0.2), main),
        box((0, -hy + 0.03, 0.55), (2 * hx, 0.06, float(rng.uniform(0.9, 1.1))), frame),
    ]
    solids += _legs(rng, (hx, hy), 0.08, frame)
    for x in (0.0,) if hx < 0.6 else (-hx / 2, hx / 2):
        solids.append(box((x, -hy + 0.28, height + 0.06), (0.52, 0.36, 0.12), pillow))
    edge = (0.0, hy - 0.2, height + 0.02)
    return model(
        "bed", main, solids, (hx, hy), seats=[edge], top=(0.6 * hx, 0.3 * hy, height + 0.03)
    )


def _cabinet(rng: np.random.Generator) -> Model:
    hx, hy = float(rng.uniform(0.3, 0.7)), float(rng.uniform(0.2, 0.3))
    height = float(rng.choice([0.6, 0.8, 1.1, 1.8]))
    main, knob = _wood(rng), plain(shade_of(rng, "grey"))
    door = main if rng.random() < 0.5 else _wood(rng)
    solids = [
        box((0, 0, height / 2 + 0.02), (2 * hx, 2 * hy, height - 0.04), main),
        box((0, 0, height - 0.015), (2 * hx + 0.04, 2 * hy + 0.03, 0.03), main),
        box((0, -0.02, 0.02), (2 * hx - 0.06, 2 * hy - 0.08, 0.04), knob),
    ]
    columns, rows = (
        (2, 1) if rng.random() < 0.5 else (int(rng.integers(1, 3)), int(rng.integers(2, 5)))
    )
    wide, high = 2 * hx / columns, (height - 0.12) / rows
    for i in range(columns):
        for j in range(rows):
            x, z = -hx + wide * (i + 0.5), 0.07 + high * (j + 0.5)
            solids.append(box((x, hy, z), (wide - 0.03, 0.03, high - 0.03), door))
            solids.append(box((x, hy + 0.025, z), (0.08, 0.03, 0.02), knob))
    return model("cabinet", main, solids, (hx, hy + 0.04), top=(0.85 * hx, 0.7 * hy, height))


def _shelf(rng: np.random.Generator) -> Model:
    hx, hy, height = (
        float(rng.uniform(0.35, 0.65)),
        float(rng.uniform(0.13, 0.18)),
        float(rng.uniform(0.9, 2.0)),
    )
    main = _wood(rng)
    boards = max(3, round(height / 0.36) + 1)
    levels = np.linspace(0.08, height - 0.015, boards)
    solids = [box((side * hx, 0, height / 2), (0.03, 2 * hy, height), main) for side in (-1, 1)]
    solids += [box((0, 0, z), (2 * hx, 2 * hy, 0.03), main) for z in levels]
    if rng.random() < 0.6:
        solids.append(box((0, -hy + 0.005, height / 2), (2 * hx, 0.01, height), main))
    covers = [_cloth(rng) for _ in range(4)]
    gap = float(levels[1] - levels[0]) - 0.05
    for z in levels[:-1]:
        x = -hx + 0.03 + float(rng.uniform(0, 0.5 * hx))
        while x < hx - 0.1 and rng.random() < 0.85:
            wide, high = float(rng.uniform(0.03, 0.12)), gap * float(rng.uniform(0.55, 0.95))
            cover = covers[int(rng.integers(4))]
            solids.append(
                box(
                    (x + wide / 2, -0.01, z + 0.015 + high / 2),
                    (wide - 0.004, 1.5 * hy, high),
                    cover,
                )
            )
            x += wide
    return model("shelf", main, solids, (hx + 0.02, hy))


BUILDERS: Mapping[str, Callable[[np.random.Generator], Model]] = {
    "table": _table, "chair": _chair, "sofa": _sofa, "bed": _bed, "cabinet": _cabinet,
    "shelf": _shelf,
}  # fmt: skip
