"""Where things stand: the seeded layout of a room, from wall furniture down to clutter.

Things are placed by drawing and rejecting overlaps of their footprints. People sit only on seats
of furniture and stand only on free floor.
"""

from collections.abc import Mapping

import numpy as np

from stages.data.scenes.clutter import build_small
from stages.data.scenes.furniture import build
from stages.data.scenes.people import build_person
from stages.data.scenes.room import Room, Thing, add_shell
from stages.data.scenes.shapes import yaw_matrix

Range = tuple[float, float]
FLOOR_SIZES: Mapping[str, Range] = {
    "lamp": (1.2, 1.7), "plant": (0.6, 1.6), "box": (0.3, 0.7), "ball": (0.25, 0.7),
}  # fmt: skip
TOP_SIZES: Mapping[str, Range] = {
    "lamp": (0.35, 0.6), "plant": (0.25, 0.5), "box": (0.15, 0.32), "ball": (0.14, 0.3),
}  # fmt: skip


def furnish(rng: np.random.Generator) -> Room:
    """Draw a room with furniture, people and clutter."""
    sides = rng.uniform(3.2, 6.0, 2)
    room = Room(size=(float(sides[0]), float(sides[1]), float(rng.uniform(2.4, 3.1))))
    add_shell(room, rng)
    _add_wall_furniture(room, rng)
    if rng.random() < 0.75:
        _add_table(room, rng)
    _add_people(room, rng)
    for kind in rng.permutation(["chair", "lamp", "plant", "box", "ball", "lamp", "plant", "ball"]):
        if rng.random() < 0.55:
            _add_loose(room, rng, str(kind))
    _add_on_tops(room, rng)
    _add_flat(room, rng)
    return room


def _against_wall(
    room: Room, rng: np.random.Generator, half: float, depth: float
) -> tuple[float, float, float]:
    """Position and yaw of something `depth` deep with its back to a random wall."""
    side = int(rng.integers(4))
    x, y = room.size[0], room.size[1]
    along = float(rng.uniform(half, max(half, (x if side % 2 == 0 else y) - half)))
    away = depth + 0.045
    spots = [
        (along, away, 0.0),
        (x - away, along, np.pi / 2),
        (along, y - away, np.pi),
        (away, along, -np.pi / 2),
    ]
    return spots[side]


def _add_wall_furniture(room: Room, rng: np.random.Generator) -> None:
    for kind in rng.permutation(["sofa", "bed", "cabinet", "shelf", "shelf", "cabinet"]):
        if rng.random() < 0.55:
            made = build(str(kind), rng)
            for _ in range(12):
                x, y, yaw = _against_wall(room, rng, made.half[0], made.half[1])
                if room.claim(made, x, y, yaw):
                    break


def _add_table(room: Room, rng: np.random.Generator) -> None:
    made = build("table", rng)
    margin = 0.45
    for _ in range(12):
        x, y = _spot(room, rng, 0.8)
        yaw = float(rng.integers(4)) * np.pi / 2 + float(rng.normal(0, 0.06))
        if room.claim(made, x, y, yaw, margin):
            break
    else:
        return
    assert made.top is not None
    if made.top[2] < 0.6:
        return
    for side in range(4):
        if rng.random() < 0.6:
            turn = yaw + side * np.pi / 2
            reach = made.half[1 - side % 2] + float(rng.uniform(0.02, 0.2))
            dx, dy = -np.sin(turn) * reach, np.cos(turn) * reach
            turned = turn + np.pi + float(rng.normal(0, 0.12))
            room.add(build("chair", rng), x + dx, y + dy, turned)


def _add_people(room: Room, rng: np.random.Generator) -> None:
    count = int(rng.choice([0, 1, 2, 3], p=[0.28, 0.38, 0.24, 0.1]))
    seats = [(thing, seat) for thing in room.things for seat in thing.model.seats]
    rng.shuffle(seats)
    for _ in range(count):
        if seats and rng.random() < 0.35:
            thing, seat = seats.pop()
            x, y, z = yaw_matrix(thing.yaw) @ np.asarray(seat) + np.asarray(thing.position)
            room.add(build_person(rng, "sitting"), float(x), float(y), thing.yaw, float(z))
            continue
        made = build_person(rng, str(rng.choice(["standing", "walking", "waving"])))
        for _ in range(15):
            x, y = _spot(room, rng, 0.35)
            if room.claim(made, x, y, float(rng.uniform(0, 2 * np.pi))):
                break


def _add_loose(room: Room, rng: np.random.Generator, kind: str) -> None:
    """One thing on free floor, rather near the walls than in the middle."""
    made = (
        build(kind, rng)
        if kind == "chair"
        else build_small(kind, rng, _draw(rng, FLOOR_SIZES[kind]))
    )
    for _ in range(10):
        yaw = float(rng.uniform(0, 2 * np.pi))
        x, y = _spot(room, rng, 0.2)
        if rng.random() < 0.5:
            x, y, yaw = _against_wall(room, rng, made.half[0], made.half[1])
        if room.claim(made, x, y, yaw):
            return


def _add_on_tops(room: Room, rng: np.random.Generator) -> None:
    """Small things on tables, cabinets and beds, in separate cells of the surface."""
    for thing in list(room.things):
        if thing.model.top is None or thing.position[2] + thing.model.top[2] > 1.5:
            continue
        hx, hy, z = thing.model.top
        cells = max(1, int(hx / 0.22))
        for cell in range(cells):
            if rng.random() > 0.4:
                continue
            kind = str(rng.choice(list(TOP_SIZES)))
            made = build_small(kind, rng, _draw(rng, TOP_SIZES[kind]))
            local = (hx * (2 * (cell + 0.5) / cells - 1), hy * float(rng.uniform(-0.5, 0.5)), z)
            x, y, top = yaw_matrix(thing.yaw) @ np.asarray(local) + np.asarray(thing.position)
            room.add(made, float(x), float(y), float(rng.uniform(0, 6.28)), float(top))


def _add_flat(room: Room, rng: np.random.Generator) -> None:
    """A rug under everything, and pictures on walls where nothing tall stands before them."""
    if rng.random() < 0.45:
        made = build_small("rug", rng, float(rng.uniform(1.2, 2.6)))
        x, y = _spot(room, rng, 1.2)
        room.add(made, x, y, float(rng.integers(2)) * np.pi / 2 + float(rng.normal(0, 0.1)))
    hung: list[Thing] = []
    for _ in range(int(rng.integers(0, 5))):
        made = build_small("picture", rng, float(rng.uniform(0.3, 0.9)))
        x, y, yaw = _against_wall(room, rng, made.half[0] + 0.1, -0.044)
        near = (t for t in room.things if t.model.kind in ("shelf", "cabinet", "lamp"))
        clear = all(np.hypot(t.position[0] - x, t.position[1] - y) > 1.0 for t in [*near, *hung])
        if clear:
            height = float(rng.uniform(1.35, 1.75))
            hung.append(room.add(made, x, y, yaw, min(height, room.size[2] - 0.6)))


def _draw(rng: np.random.Generator, bounds: Range) -> float:
    return float(rng.uniform(*bounds))


def _spot(room: Room, rng: np.random.Generator, margin: float) -> tuple[float, float]:
    x = float(rng.uniform(margin, room.size[0] - margin))
    return x, float(rng.uniform(margin, room.size[1] - margin))
