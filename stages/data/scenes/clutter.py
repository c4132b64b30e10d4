"""Smaller things: lamps, plants, boxes, balls, and the flat ones, rugs and pictures."""

from collections.abc import Callable, Mapping

import numpy as np

from stages.data.scenes.furniture import Model, model
from stages.data.scenes.materials import PALETTE, draw_material, plain
from stages.data.scenes.shapes import align_matrix, box, ellipsoid, rod

LEAFY = (*PALETTE, *("green",) * 16)
CLOTH = ("plain", "striped", "checked", "mottled", "dotted")


def build_small(kind: str, rng: np.random.Generator, size: float) -> Model:
    """Draw a model of a `SMALL_BUILDERS` class; `size` is its height or width in metres."""
    return SMALL_BUILDERS[kind](rng, size)


def _lamp(rng: np.random.Generator, size: float) -> Model:
    main = draw_material(rng, scale=8.0)
    frame = draw_material(rng, patterns=("plain", "wooden"))
    wide = size * 0.28 if size < 0.8 else float(rng.uniform(0.16, 0.24))
    high = wide * float(rng.uniform(1.0, 1.5))
    foot = wide * float(rng.uniform(0.5, 0.8))
    if rng.random() < 0.5:
        main = plain(main.first, name=main.name, emission=float(rng.uniform(0.4, 1.2)))
    solids = [
        rod((0, 0, 0), (0, 0, 0.025), foot, frame),
        rod((0, 0, 0.02), (0, 0, size - high), 0.012 + 0.03 * foot, frame),
        rod((0, 0, size - high), (0, 0, size), wide, main, end_radius=wide * rng.uniform(0.4, 1.0)),
    ]
    return model("lamp", main, solids, (wide, wide))


def _plant(rng: np.random.Generator, size: float) -> Model:
    pot = draw_material(rng, scale=9.0)
    leaf = draw_material(rng, colours=LEAFY, patterns=("plain", "mottled", "striped"), scale=10.0)
    high, radius = size * float(rng.uniform(0.25, 0.4)), size * float(rng.uniform(0.12, 0.2))
    solids = [rod((0, 0, 0), (0, 0, high), 0.7 * radius, pot, end_radius=radius)]
    count, spread = int(rng.integers(7, 13)), float(rng.uniform(0.3, 0.8))
    for turn in np.arange(count) * 2.4 + rng.uniform(0, 6):
        tilt = spread * float(rng.uniform(0.2, 1.2))
        direction = np.array(
            [np.cos(turn) * np.sin(tilt), np.sin(turn) * np.sin(tilt), np.cos(tilt)]
        )
        length = (size - high) * float(rng.uniform(0.35, 0.5))
        solids.append(
            ellipsoid(
                np.array([0, 0, high]) + direction * length,
                (0.2 * length, 0.32 * length, length),
                leaf,
                rotation=align_matrix(direction),
            )
        )
    half = radius + 0.12 * size
    return model("plant", leaf, solids, (half, half))


def _box(rng: np.random.Generator, size: float) -> Model:
    hx, hy = 0.5 * size * float(rng.uniform(0.8, 1.5)), 0.5 * size * float(rng.uniform(0.7, 1.2))
    main = draw_material(rng, scale=9.0)
    solids = [box((0, 0, size / 2), (2 * hx, 2 * hy, size), main)]
    if rng.random() < 0.4:
        lid = draw_material(rng, scale=9.0)
        solids.append(box((0, 0, 0.92 * size), (2 * hx + 0.02, 2 * hy + 0.02, 0.2 * size), lid))
    return model("box", main, solids, (hx, hy))


def _ball(rng: np.random.Generator, size: float) -> Model:
    main = draw_material(rng, scale=9.0)
    half = size / 2
    return model("ball", main, [ellipsoid((0, 0, half), (half, half, half), main)], (half, half))


def _rug(rng: np.random.Generator, size: float) -> Model:
    main = draw_material(rng, patterns=CLOTH, scale=3.0, level=True)
    hx, hy = size / 2, 0.5 * size * float(rng.uniform(0.5, 0.9))
    if rng.random() < 0.3:
        return model("rug", main, [rod((0, 0, 0), (0, 0, 0.012), hx, main)], (hx, hx))
    border = main if rng.random() < 0.5 else draw_material(rng, patterns=("plain",))
    solids = [
        box((0, 0, 0.005), (2 * hx, 2 * hy, 0.01), border),
        box((0, 0, 0.008), (2 * hx - 0.2, 2 * hy - 0.2, 0.012), main),
    ]
    return model("rug", main, solids, (hx, hy))


def _picture(rng: np.random.Generator, size: float) -> Model:
    """A framed picture whose back lies in the plane y = 0 and whose middle is the origin."""
    frame = draw_material(rng, patterns=("plain", "wooden"))
    main = draw_material(rng, patterns=("mottled", "striped", "checked", "dotted"), scale=5.0)
    wide, high = size * float(rng.uniform(0.7, 1.4)), size * float(rng.uniform(0.7, 1.2))
    solids = [
        box((0, 0.015, 0), (wide, 0.03, high), frame),
        box((0, 0.02, 0), (wide - 0.09, 0.03, high - 0.09), main),
    ]
    return model("picture", main, solids, (wide / 2, 0.03))


SMALL_BUILDERS: Mapping[str, Callable[[np.random.Generator, float], Model]] = {
    "lamp": _lamp, "plant": _plant, "box": _box, "ball": _ball, "rug": _rug, "picture": _picture,
}  # fmt: skip
