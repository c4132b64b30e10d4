"""The camera: a pinhole inside the room, chosen among random candidates by what it would see."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.data.scenes.room import Room, Thing

Array = npt.NDArray[np.float32]
Probe = Callable[[Array, Array], tuple[npt.NDArray[np.int32], Array]]
CANDIDATES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """`position` in metres; rows of `axes` are right, down and forward; `focal` in image widths."""

    position: Array
    axes: Array
    focal: float

    def rays(self, height: int, width: int, offsets: npt.NDArray[np.floating]) -> Array:
        """Ray directions whose length along the optical axis is 1, so that ray length is z-depth.

        Args:
            height: image height in pixels.
            width: image width in pixels.
            offsets: positions inside a pixel, S x 2 as (x, y) in 0..1; 0.5 is its centre.

        Returns:
            World directions, S x height x width x 3.
        """
        x = (np.arange(width) + offsets[:, :1] - width / 2) / (self.focal * width)
        y = (np.arange(height) + offsets[:, 1:] - height / 2) / (self.focal * width)
        local = np.empty((len(offsets), height, width, 3), np.float32)
        local[..., 0], local[..., 1], local[..., 2] = x[:, None, :], y[:, :, None], 1.0
        return local @ self.axes


def choose_camera(rng: np.random.Generator, room: Room, probe: Probe) -> Camera:
    """Draw cameras and keep the one whose coarse view (12 x 16 rays) shows most.

    `probe` takes origins and directions N x 3 and returns indices of things and ray lengths.
    """
    cameras = [_draw_camera(rng, room) for _ in range(CANDIDATES)]
    center = np.array([[0.5, 0.5]])
    directions = np.concatenate([c.rays(12, 16, center).reshape(-1, 3) for c in cameras])
    origins = np.repeat(np.stack([c.position for c in cameras]), 12 * 16, axis=0)
    things, depth = probe(origins, directions)
    views = zip(np.split(things, CANDIDATES), np.split(depth, CANDIDATES), strict=True)
    scores = [_score(t, d, room) for t, d in views]
    return cameras[int(np.argmax(scores))]


def _score(things: npt.NDArray[np.int32], depth: Array, room: Room) -> float:
    """Visible things count, people more; a view pressed against something counts for nothing."""
    if np.quantile(depth, 0.1) < 0.7 or np.median(depth) < 1.6:
        return -1.0
    counts = np.bincount(things, minlength=len(room.things))
    seen = [t for t, n in zip(room.things, counts, strict=True) if t.instance and n >= 2]
    kinds = [t.model.kind for t in seen]
    return len(seen) + 1.0 * kinds.count("person") + 0.5 * len(set(kinds))


def _draw_camera(rng: np.random.Generator, room: Room) -> Camera:
    position = _free_position(rng, room)
    forward = np.asarray(_target(rng, room)) - position
    while np.hypot(forward[0], forward[1]) < 0.4:  # never straight up or down
        forward = np.asarray(_target(rng, room)) - position
    flat = np.hypot(forward[0], forward[1])
    forward[2] = np.clip(forward[2] / flat, -0.45, 0.2) * flat
    forward /= np.linalg.norm(forward)
    right = np.array([forward[1], -forward[0], 0.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    roll = float(rng.normal(0, 0.03))
    c, s = np.cos(roll), np.sin(roll)
    axes = np.stack([c * right + s * down, c * down - s * right, forward]).astype(np.float32)
    view = float(np.radians(rng.uniform(52, 82)))
    return Camera(position=position.astype(np.float32), axes=axes, focal=0.5 / np.tan(view / 2))


def _free_position(rng: np.random.Generator, room: Room) -> npt.NDArray[np.float64]:
    """A point near a wall that is not above or inside anything standing on the floor."""
    x, y = 0.0, 0.0
    for _ in range(30):
        x = _towards_wall(rng, room.size[0])
        y = _towards_wall(rng, room.size[1])
        if room.free((x - 0.25, y - 0.25, x + 0.25, y + 0.25)):
            break
    else:  # a crowded room: stand in a corner, above the furniture
        return np.array([0.3, 0.3, room.size[2] - 0.3])
    return np.array([x, y, float(rng.uniform(0.9, 1.9))])


def _towards_wall(rng: np.random.Generator, length: float) -> float:
    share = float(rng.beta(0.6, 0.6))
    return 0.27 + share * (length - 0.54)


def _target(rng: np.random.Generator, room: Room) -> tuple[float, float, float]:
    things: list[Thing] = [t for t in room.things if t.instance > 0 and t.model.kind != "picture"]
    people = [t for t in things if t.model.kind == "person"]
    if people and rng.random() < 0.4:
        things = people
    if not things or rng.random() < 0.2:
        return room.size[0] / 2, room.size[1] / 2, float(rng.uniform(0.5, 1.2))
    x, y, _ = things[int(rng.integers(len(things)))].position
    return (
        x + float(rng.normal(0, 0.4)),
        y + float(rng.normal(0, 0.4)),
        float(rng.uniform(0.4, 1.2)),
    )
