"""Solids of a scene: unit meshes from trimesh, stretched and placed in metres.

Frames are right-handed with z up. An object's own frame has its origin on the floor under its
centre and faces +y; textures are evaluated in that frame, so that they move with the object.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import trimesh

from stages.data.scenes.materials import Material

Array = npt.NDArray[np.float32]
Number = float | int  # spelled out because the run-time checker takes `float` literally
Vector = Sequence[Number] | npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solid:
    """A triangle mesh of one material: vertices and normals V x 3 in metres, faces F x 3."""

    vertices: Array
    normals: Array
    faces: npt.NDArray[np.int32]
    material: Material
    part: int = 0

    def placed(self, rotation: npt.NDArray[np.floating], offset: Vector) -> "Solid":
        """The same solid turned by a 3 x 3 rotation and then moved."""
        turned = rotation.astype(np.float32)
        return Solid(
            vertices=self.vertices @ turned.T + np.asarray(offset, np.float32),
            normals=self.normals @ turned.T,
            faces=self.faces,
            material=self.material,
            part=self.part,
        )


def yaw_matrix(yaw: float) -> npt.NDArray[np.float64]:
    """Rotation by `yaw` radians about the upward axis."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def align_matrix(direction: Vector) -> npt.NDArray[np.float64]:
    """A rotation that takes the z axis to `direction` (Duff et al. 2017, JCGT 6(1))."""
    x, y, z = (np.asarray(direction, np.float64) / np.linalg.norm(direction)).tolist()
    sign = math.copysign(1.0, z)
    a = -1.0 / (sign + z)
    b = x * y * a
    return np.array(
        [[1 + sign * x * x * a, b, x], [sign * b, sign + y * y * a, y], [-sign * x, -y, z]]
    )


def box(center: Vector, size: Vector, material: Material) -> Solid:
    """An axis-aligned box given by its centre and edge lengths."""
    vertices, normals, faces = _unit_box()
    scaled = vertices * np.asarray(size, np.float32) + np.asarray(center, np.float32)
    return Solid(vertices=scaled, normals=normals, faces=faces, material=material)


def rod(
    start: Vector,
    end: Vector,
    radius: float,
    material: Material,
    *,
    end_radius: float | None = None,
) -> Solid:
    """A cylinder between two points, or a frustum when the radii differ."""
    low, high = np.asarray(start, np.float32), np.asarray(end, np.float32)
    top = radius if end_radius is None else end_radius
    vertices, normals, faces = _unit_cylinder()
    length = float(np.linalg.norm(high - low))
    share = vertices[:, 2:3]
    shaped = vertices * np.array([1, 1, length], np.float32)
    shaped[:, :2] *= radius + (top - radius) * share
    tilted = normals.copy()
    side = np.abs(normals[:, 2]) < 0.5
    tilted[side, 2] = (radius - top) / length
    tilted /= np.linalg.norm(tilted, axis=1, keepdims=True)
    local = Solid(vertices=shaped, normals=tilted, faces=faces, material=material)
    return local.placed(align_matrix(high - low), low)


def ellipsoid(
    center: Vector,
    radii: Vector,
    material: Material,
    *,
    rotation: npt.NDArray[np.float64] | None = None,
    part: int = 0,
) -> Solid:
    """An ellipsoid with the given half axes, turned about its centre."""
    vertices, faces = _unit_sphere()
    half = np.asarray(radii, np.float32)
    normals = vertices / half
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    local = Solid(
        vertices=vertices * half, normals=normals, faces=faces, material=material, part=part
    )
    return local.placed(np.eye(3) if rotation is None else rotation, center)


def capsule(
    start: Vector,
    end: Vector,
    radius: float,
    material: Material,
    *,
    end_radius: float | None = None,
    part: int = 0,
) -> Solid:
    """A limb: two spheres, possibly of different size, and the skin between them."""
    low, high = np.asarray(start, np.float32), np.asarray(end, np.float32)
    directions, faces = _unit_capsule()
    upper = directions[:, 2:3] > 0
    radii = np.where(upper, radius if end_radius is None else end_radius, radius)
    length = float(np.linalg.norm(high - low))
    vertices = directions * radii.astype(np.float32)
    vertices[:, 2:3] += np.where(upper, length, 0.0).astype(np.float32)
    local = Solid(vertices=vertices, normals=directions, faces=faces, material=material, part=part)
    return local.placed(align_matrix(high - low), low)


@cache
def _unit_box() -> tuple[Array, Array, npt.NDArray[np.int32]]:
    """A cube of edge 1 whose faces share no vertices, so that its edges stay sharp."""
    mesh = trimesh.creation.box(extents=(1, 1, 1))
    vertices = np.asarray(mesh.triangles, np.float32).reshape(-1, 3)
    normals = np.repeat(np.asarray(mesh.face_normals, np.float32), 3, axis=0)
    return vertices, normals, np.arange(len(vertices), dtype=np.int32).reshape(-1, 3)


@cache
def _unit_cylinder() -> tuple[Array, Array, npt.NDArray[np.int32]]:
    """Radius 1, z from 0 to 1; side vertices carry radial normals, caps flat ones."""
    mesh = trimesh.creation.cylinder(radius=1, height=1, sections=20)
    triangles = np.asarray(mesh.triangles, np.float32)
    flat = np.repeat(np.asarray(mesh.face_normals, np.float32), 3, axis=0)
    vertices = triangles.reshape(-1, 3)
    side = np.abs(flat[:, 2]) < 0.5
    radial = vertices * np.array([1, 1, 0], np.float32)
    normals = np.where(side[:, None], radial, flat).astype(np.float32)
    vertices = vertices + np.array([0, 0, 0.5], np.float32)
    return vertices, normals, np.arange(len(vertices), dtype=np.int32).reshape(-1, 3)


@cache
def _unit_sphere() -> tuple[Array, npt.NDArray[np.int32]]:
    """Radius 1; a vertex is its own normal."""
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=1)
    return np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int32)


@cache
def _unit_capsule() -> tuple[Array, npt.NDArray[np.int32]]:
    """A sphere with no vertex on its equator: splitting it there makes the capsule's skin."""
    mesh = trimesh.creation.uv_sphere(radius=1, count=[10, 14])
    vertices = np.asarray(mesh.vertices, np.float32)
    assert np.abs(vertices[:, 2]).min() > 1e-3
    return vertices, np.asarray(mesh.faces, np.int32)
