"""All solids of a room in one embree geometry, with tables from triangle to thing and material."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from stages.data.scenes.materials import Material, material_table
from stages.data.scenes.room import Thing
from stages.data.scenes.shapes import Solid, yaw_matrix

Array = npt.NDArray[np.float32]
Index = npt.NDArray[np.int32]
EPSILON = 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """What N rays meet first; `solid` is -1 and `depth` infinite where they meet nothing."""

    solid: Index
    depth: Array
    normals: Array
    """World unit normals N x 3 that face the ray's origin."""
    local: Array
    """Hit points N x 3 in the frame of the thing, metres."""


class Tracer:
    """Ray queries against fixed things; every table below is per solid or per triangle."""

    def __init__(self, things: Sequence[Thing]) -> None:
        """Build the ray-tracing structure; takes a few milliseconds."""
        solids = [(solid, owner) for owner, t in enumerate(things) for solid in t.model.solids]
        self.thing: Index = np.array([owner for _, owner in solids], np.int32)
        self.part: Index = np.array([solid.part for solid, _ in solids], np.int32)
        self.material, self.materials = _material_index([solid for solid, _ in solids])
        first = np.concatenate([[0], np.cumsum([len(s.vertices) for s, _ in solids])[:-1]])
        faces: Index = np.concatenate(
            [s.faces + int(f) for (s, _), f in zip(solids, first, strict=True)], dtype=np.int32
        )
        self._solid: Index = np.repeat(
            np.arange(len(solids), dtype=np.int32), [len(s.faces) for s, _ in solids]
        )
        placed = [_placed(thing) for thing in things]
        local = np.concatenate([s.vertices for s, _ in solids])
        normals = np.concatenate([normals for _, normals in placed])
        self._corners: Array = np.concatenate([local, normals], axis=1)[faces]
        self._scene = EmbreeScene()
        TriangleMesh(self._scene, np.concatenate([world for world, _ in placed]), faces)

    def cast(self, origins: Array, directions: Array) -> Hits:
        """First hits of rays N x 3; depth is in lengths of the given directions."""
        found = self._scene.run(origins, directions, output=True)
        triangle, u, v = found["primID"], found["u"], found["v"]
        missed = triangle < 0
        weights = np.stack([1 - u - v, u, v], axis=1)[:, None]
        mixed: Array = np.matmul(weights, self._corners[triangle])[:, 0]
        return Hits(
            solid=np.where(missed, np.int32(-1), self._solid[triangle]),
            depth=np.where(missed, np.float32(np.inf), found["tfar"]),
            normals=_facing(mixed[:, 3:], found["Ng"], directions),
            local=mixed[:, :3],
        )

    def nearest(self, origins: Array, directions: Array) -> tuple[Index, Array]:
        """Only the things (index into the given ones) and depths of the first hits."""
        found = self._scene.run(origins, directions, output=True)
        thing: Index = self.thing[self._solid[found["primID"]]]
        depth: Array = found["tfar"]
        return thing, depth

    def lit(self, points: Array, towards: Array) -> npt.NDArray[np.bool_]:
        """Whether nothing lies between points N x 3 and points + towards."""
        reach = np.full(len(points), 1.0 - EPSILON, np.float32)
        blocked = self._scene.run(points, towards, reach, query="OCCLUDED")
        result: npt.NDArray[np.bool_] = blocked != 0
        return result


def _placed(thing: Thing) -> tuple[Array, Array]:
    """World vertices and normals V x 3 of all solids of a thing."""
    turn = yaw_matrix(thing.yaw).T.astype(np.float32)
    vertices = np.concatenate([s.vertices for s in thing.model.solids])
    normals = np.concatenate([s.normals for s in thing.model.solids])
    return vertices @ turn + np.asarray(thing.position, np.float32), normals @ turn


def _material_index(solids: Sequence[Solid]) -> tuple[Index, Array]:
    """Row of each solid in a table of the distinct materials, and the table."""
    rows: dict[int, int] = {}
    distinct: list[Material] = []
    for solid in solids:
        if id(solid.material) not in rows:
            rows[id(solid.material)] = len(distinct)
            distinct.append(solid.material)
    index = np.array([rows[id(s.material)] for s in solids], np.int32)
    return index, material_table(distinct)


def _facing(smooth: Array, flat: Array, directions: Array) -> Array:
    """Unit normals towards the viewer; at silhouettes, where the smooth one looks away, the flat.

    Flat normals are turned to the viewer first: a camera may look at the inside of a solid.
    """
    away = _dot(flat, directions) > 0
    turned = np.where(away[:, None], -flat, flat)
    bad = _dot(smooth, directions) > 0
    chosen = np.where(bad[:, None], turned, smooth)
    length = np.linalg.norm(chosen, axis=1, keepdims=True)
    result: Array = (chosen / np.maximum(length, 1e-12)).astype(np.float32, copy=False)
    return result


def _dot(a: Array, b: Array) -> Array:
    result: Array = np.einsum("nc,nc->n", a, b)
    return result
