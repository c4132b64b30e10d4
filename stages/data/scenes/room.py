"""The room and the placement of things in it: the scene graph.

World frame: x and y along the floor from one corner, z up, metres. Things are placed by drawing
and rejecting overlaps of their footprints, so that nothing is pushed through anything else.
"""

from dataclasses import dataclass, field

import numpy as np

from stages.data.scenes.furniture import Model, model
from stages.data.scenes.materials import PATTERNS, draw_material
from stages.data.scenes.shapes import box

Rectangle = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """A model placed in the world: `position` of its origin, `yaw` radians about the vertical."""

    model: Model
    position: tuple[float, float, float]
    yaw: float
    instance: int
    """0 for a surface of the room, else one number per object or person."""


@dataclass(slots=True, kw_only=True)
class Room:
    """A room of `size` (x, y, z) metres and what stands in it; grows while it is furnished."""

    size: tuple[float, float, float]
    things: list[Thing] = field(default_factory=list)
    taken: list[Rectangle] = field(default_factory=list)

    def free(self, area: Rectangle) -> bool:
        """Whether a floor rectangle (x0, y0, x1, y1) is inside the room and touches nothing."""
        x0, y0, x1, y1 = area
        if x0 < 0 or y0 < 0 or x1 > self.size[0] or y1 > self.size[1]:
            return False
        return not any(x0 < c and a < x1 and y0 < d and b < y1 for a, b, c, d in self.taken)

    def add(self, made: Model, x: float, y: float, yaw: float, z: float = 0.0) -> Thing:
        """Place a model without asking whether there is room."""
        instance = 1 + max((t.instance for t in self.things), default=0)
        thing = Thing(model=made, position=(x, y, z), yaw=yaw, instance=instance)
        self.things.append(thing)
        return thing

    def claim(
        self, made: Model, x: float, y: float, yaw: float, margin: float = 0.04
    ) -> Thing | None:
        """Place a model on the floor and take its footprint, or nothing when it does not fit."""
        area = footprint(made.half, x, y, yaw, margin)
        if not self.free(area):
            return None
        self.taken.append(area)
        return self.add(made, x, y, yaw)


def footprint(
    half: tuple[float, float], x: float, y: float, yaw: float, margin: float
) -> Rectangle:
    """The axis-aligned rectangle around a turned one."""
    c, s = abs(np.cos(yaw)), abs(np.sin(yaw))
    hx = float(c * half[0] + s * half[1]) + margin
    hy = float(s * half[0] + c * half[1]) + margin
    return x - hx, y - hy, x + hx, y + hy


def add_shell(room: Room, rng: np.random.Generator) -> None:
    """Floor, ceiling and four walls: six boxes outside the room's volume, instance 0."""
    x, y, z = room.size
    thick = 0.1
    floor = draw_material(rng, patterns=(*PATTERNS, "wooden", "checked"), scale=2.5, level=True)
    ceiling = draw_material(rng, colours=("white",) * 5 + ("beige", "grey", "blue", "brown"),
                            patterns=("plain",) * 4 + PATTERNS, scale=2.0, level=True)  # fmt: skip
    calm = ("plain",) * 6 + PATTERNS
    wall = draw_material(rng, patterns=calm, scale=3.0)
    odd = draw_material(rng, patterns=calm, scale=3.0) if rng.random() < 0.4 else wall
    slabs = [
        ("floor", floor, (x / 2, y / 2, -thick / 2), (x + 1, y + 1, thick)),
        ("ceiling", ceiling, (x / 2, y / 2, z + thick / 2), (x + 1, y + 1, thick)),
        ("wall", odd, (-thick / 2, y / 2, z / 2), (thick, y + 1, z)),
        ("wall", wall, (x + thick / 2, y / 2, z / 2), (thick, y + 1, z)),
        ("wall", wall, (x / 2, -thick / 2, z / 2), (x + 1, thick, z)),
        ("wall", wall, (x / 2, y + thick / 2, z / 2), (x + 1, thick, z)),
    ]
    for kind, material, center, size in slabs:
        made = model(kind, material, [box(center, size, material)], (x / 2, y / 2))
        room.things.append(Thing(model=made, position=(0.0, 0.0, 0.0), yaw=0.0, instance=0))
