"""Articulated people: a skeleton of joint angles dressed with capsules.

The body faces +y, its left is -x (seen from behind the body, x is right). Angles are radians.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stages.data.scenes.furniture import Model, model
from stages.data.scenes.materials import SKIN, Material, draw_material, plain
from stages.data.scenes.shapes import Solid, capsule, ellipsoid, yaw_matrix

PARTS = (
    "background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg",
)  # fmt: skip
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)
POSES = ("standing", "walking", "waving", "sitting")
CLOTHES = ("plain", "plain", "striped", "checked", "mottled", "dotted")
Joint = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pose:
    """Angles per side (left, right): swing forwards, spread outwards, then bend of the joint."""

    name: str
    hip: tuple[float, float]
    knee: tuple[float, float]
    shoulder: tuple[float, float]
    spread: tuple[float, float]
    elbow: tuple[float, float]
    lean: float
    turn: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wear:
    """The materials of a person."""

    skin: Material
    hair: Material
    top: Material
    trousers: Material
    shoes: Material
    sleeve: Material
    leg: Material


def build_person(rng: np.random.Generator, pose: str) -> Model:
    """Draw a person in one of `POSES`; the origin lies under the hips (sitting: on the seat)."""
    wear, angles = _draw_wear(rng), _draw_pose(rng, pose)
    height = float(rng.uniform(1.45, 1.9))
    girth = height * float(rng.uniform(0.9, 1.2))
    solids = _body(angles, wear, height, girth)
    if pose != "sitting":
        lowest = min(float(s.vertices[:, 2].min()) for s in solids)
    else:
        lowest = -0.075 * girth  # the lower side of the hips rests on the seat
    lifted = [s.placed(np.eye(3), (0, 0, -lowest)) for s in solids]
    return model("person", wear.top, lifted, (0.28, 0.28), pose=pose)


def _draw_wear(rng: np.random.Generator) -> Wear:
    skin = plain(np.asarray(SKIN[rng.integers(len(SKIN))]) * rng.uniform(0.85, 1.1), name="skin")
    hair = draw_material(
        rng, colours=("black", "brown", "brown", "grey", "yellow", "orange"), patterns=("mottled",)
    )
    top = draw_material(rng, patterns=CLOTHES, scale=9.0)
    trousers = draw_material(rng, patterns=CLOTHES, scale=9.0)
    if rng.random() < 0.2:
        trousers = top
    return Wear(
        skin=skin, hair=hair, top=top, trousers=trousers,
        shoes=draw_material(rng, patterns=("plain",)),
        sleeve=skin if rng.random() < 0.5 else top,
        leg=skin if rng.random() < 0.25 else trousers,
    )  # fmt: skip


def _draw_pose(rng: np.random.Generator, name: str) -> Pose:
    def pair(low: float, high: float) -> tuple[float, float]:
        left, right = rng.uniform(low, high, 2).tolist()
        return left, right

    pose = Pose(
        name=name, hip=pair(-0.08, 0.12), knee=pair(0.0, 0.12), shoulder=pair(-0.25, 0.35),
        spread=pair(0.06, 0.25), elbow=pair(0.05, 0.9), lean=float(rng.uniform(-0.05, 0.12)),
        turn=float(rng.uniform(-0.7, 0.7)),
    )  # fmt: skip
    if name == "walking":
        step = float(rng.uniform(0.3, 0.6)) * float(rng.choice([-1, 1]))
        back_knee = float(rng.uniform(0.3, 0.9))
        return replace(
            pose, hip=(step, -step), shoulder=(-step, step), lean=0.08,
            knee=(0.1, back_knee) if step > 0 else (back_knee, 0.1),
        )  # fmt: skip
    if name == "waving":
        raised = float(rng.uniform(2.1, 2.8))
        side = int(rng.integers(2))
        arm = (raised, pose.spread[1]) if side == 0 else (pose.spread[0], raised)
        bend = float(rng.uniform(0.2, 1.0))
        elbow = (bend, pose.elbow[1]) if side == 0 else (pose.elbow[0], bend)
        return replace(pose, spread=arm, elbow=elbow, shoulder=(0.1, 0.1))
    if name == "sitting":
        return replace(
            pose, hip=pair(1.35, 1.55), knee=pair(1.2, 1.7), shoulder=pair(0.1, 0.8),
            elbow=pair(0.3, 1.2), lean=float(rng.uniform(-0.15, 0.2)),
        )  # fmt: skip
    return pose


def _hang(swing: float, spread: float, side: int) -> Joint:
    """Unit vector of a limb that hangs, swung forwards (+y) and spread to its side (x)."""
    out = side * np.sin(spread)
    return np.array([out, np.sin(swing) * np.cos(spread), -np.cos(swing) * np.cos(spread)])


def _body(pose: Pose, wear: Wear, height: float, girth: float) -> list[Solid]:
    up = np.array([0.0, np.sin(pose.lean), np.cos(pose.lean)])
    hips = np.zeros(3)
    chest = hips + 0.25 * height * up
    neck = hips + 0.31 * height * up
    torso = wear.top
    solids = [
        ellipsoid(hips, (0.095 * girth, 0.07 * girth, 0.075 * girth), wear.trousers, part=TORSO),
        _trunk(hips, chest, girth, torso),
        capsule(chest + 0.03 * height * up, neck + 0.04 * height * up, 0.032 * girth, wear.skin,
                part=HEAD),
        *_head(neck + 0.115 * height * up, pose.turn, height, wear),
    ]  # fmt: skip
    for index, side in enumerate((-1, 1)):
        solids += _leg(pose, wear, index, side, height, girth)
        shoulder = chest + np.array([side * 0.105 * girth, 0, 0]) + 0.02 * height * up
        solids += _arm(pose, wear, index, side, shoulder, height, girth)
    return solids


def _trunk(hips: Joint, chest: Joint, girth: float, material: Material) -> Solid:
    """A capsule flattened from front to back, upright in its own frame before the lean."""
    length = float(np.linalg.norm(chest - hips))
    upright = capsule((0, 0, 0), (0, 0, length), 0.075 * girth, material,
                      end_radius=0.085 * girth, part=TORSO)  # fmt: skip
    wide = np.array([1.35, 0.85, 1.0], np.float32)
    normals = upright.normals / wide
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    lean = np.arctan2(chest[1] - hips[1], chest[2] - hips[2])
    c, s = np.cos(lean), np.sin(lean)
    flat = replace(upright, vertices=upright.vertices * wide, normals=normals)
    return flat.placed(np.array([[1, 0, 0], [0, c, s], [0, -s, c]]), hips)


def _head(center: Joint, turn: float, height: float, wear: Wear) -> list[Solid]:
    rotation = yaw_matrix(turn)
    front = rotation @ np.array([0.0, 1.0, 0.0])
    radii = (0.046 * height, 0.055 * height, 0.066 * height)
    hair = center - 0.014 * height * front + np.array([0, 0, 0.015 * height])
    nose = center + 0.056 * height * front - np.array([0, 0, 0.005 * height])
    grown = (radii[0] * 1.08, radii[1], radii[2] * 0.9)
    return [
        ellipsoid(center, radii, wear.skin, rotation=rotation, part=HEAD),
        ellipsoid(hair, grown, wear.hair, rotation=rotation, part=HEAD),
        ellipsoid(nose, np.full(3, 0.011 * height), wear.skin, part=HEAD),
    ]


def _leg(pose: Pose, wear: Wear, index: int, side: int, height: float, girth: float) -> list[Solid]:
    hip = np.array([side * 0.055 * girth, 0.0, -0.01 * height])
    knee = hip + 0.235 * height * _hang(pose.hip[index], 0.05, side)
    ankle = knee + 0.23 * height * _hang(pose.hip[index] - pose.knee[index], 0.0, side)
    toe = ankle + np.array([0.0, 0.085 * height, -0.012 * height])
    return [
        capsule(hip, knee, 0.055 * girth, wear.trousers, end_radius=0.036 * girth, part=UPPER_LEG),
        capsule(knee, ankle, 0.035 * girth, wear.leg, end_radius=0.023 * girth, part=LOWER_LEG),
        capsule(ankle, toe, 0.025 * girth, wear.shoes, end_radius=0.019 * girth, part=LOWER_LEG),
    ]


def _arm(
    pose: Pose, wear: Wear, index: int, side: int, shoulder: Joint, height: float, girth: float
) -> list[Solid]:
    spread, bend = pose.spread[index], pose.elbow[index]
    elbow = shoulder + 0.165 * height * _hang(pose.shoulder[index], spread, side)
    if spread > 1.5:  # a raised forearm bends inwards, over the head
        lower = _hang(pose.shoulder[index], spread + bend, side)
    else:
        lower = _hang(pose.shoulder[index] + bend, 0.5 * spread, side)
    wrist = elbow + 0.15 * height * lower
    hand = wrist + 0.03 * height * lower
    return [
        capsule(shoulder, elbow, 0.034 * girth, wear.top, end_radius=0.026 * girth, part=UPPER_ARM),
        capsule(elbow, wrist, 0.025 * girth, wear.sleeve, end_radius=0.019 * girth, part=LOWER_ARM),
        ellipsoid(hand, np.full(3, 0.026 * girth), wear.skin, part=LOWER_ARM),
    ]
