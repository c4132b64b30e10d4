"""Light and lens: point lights with shadows, a hemisphere of ambient light, exposure, noise."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.data.scenes.materials import albedo
from stages.data.scenes.trace import EPSILON, Hits, Tracer

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lighting:
    """One to three lamps (L) and the ambient light."""

    positions: Array
    """L x 3, metres."""
    colours: Array
    """L x 3, linear power."""
    offsets: Array
    """L x S x 3, metres: points of the lamp seen by each sample of a pixel; they soften shadows."""
    sky: Array
    """Ambient colour from above."""
    ground: Array
    """Ambient colour from below."""


def draw_lighting(rng: np.random.Generator, size: tuple[float, float, float]) -> Lighting:
    """Draw one to three lights in the upper part of a room of `size` (x, y, z) metres."""
    count = int(rng.integers(1, 4))
    share = np.stack([rng.uniform(0.1, 0.9, count), rng.uniform(0.1, 0.9, count),
                      rng.uniform(0.72, 0.96, count)], axis=1)  # fmt: skip
    warmth = rng.uniform(-0.15, 0.22, (count, 1)) * np.array([1.0, 0.1, -1.0])
    power = rng.uniform(0.4, 1.0, (count, 1))
    ambient = float(rng.uniform(0.1, 0.3))
    tint = 1 + rng.normal(0, 0.05, 3)
    return Lighting(
        positions=(share * np.asarray(size)).astype(np.float32),
        colours=(power * (1 + warmth)).astype(np.float32),
        offsets=rng.normal(0, rng.uniform(0.01, 0.1), (count, 4, 3)).astype(np.float32),
        sky=(ambient * tint).astype(np.float32),
        ground=(ambient * float(rng.uniform(0.4, 0.9)) * tint).astype(np.float32),
    )


def shade(
    tracer: Tracer, lighting: Lighting, hits: Hits, origins: Array, directions: Array, samples: int
) -> Array:
    """Linear radiance N x 3 of hits; rays come in `samples` equal groups, one lamp offset each.

    Lambert's law, and Blinn's highlights from the share `gloss` of a material.
    """
    rows = tracer.material[hits.solid]
    colour = albedo(tracer.materials, rows, hits.local)
    gloss, emission = tracer.materials[rows, 11:12], tracer.materials[rows, 12:13]
    points = origins + directions * np.where(np.isinf(hits.depth), 0, hits.depth)[:, None]
    points += hits.normals * EPSILON  # off the surface, or it would shade itself
    view = -directions / _length(directions)
    upward = 0.5 + 0.5 * hits.normals[:, 2:3]
    diffuse = lighting.ground + (lighting.sky - lighting.ground) * upward
    shine = np.zeros((len(points), 1), np.float32)
    for lamp, power in enumerate(lighting.colours):
        spread = np.repeat(lighting.offsets[lamp, :samples], len(points) // samples, axis=0)
        towards = lighting.positions[lamp] + spread - points
        distance = _length(towards)
        strength = _unshadowed(tracer, points, towards, hits.normals) / (0.6 + 0.35 * distance**2)
        towards /= distance
        diffuse += np.maximum(_dot(hits.normals, towards), 0) * strength * power
        half = towards + view
        half /= np.maximum(_length(half), 1e-6)
        shine += np.maximum(_dot(hits.normals, half), 0) ** 40 * strength
    result: Array = colour * (diffuse + emission) + gloss * shine
    return result


def _unshadowed(tracer: Tracer, points: Array, towards: Array, normals: Array) -> Array:
    """1 where a lamp is in front of the surface and nothing stands between, else 0; N x 1."""
    front = np.flatnonzero(_dot(normals, towards)[:, 0] > 0)
    result = np.zeros((len(points), 1), np.float32)
    result[front[tracer.lit(points[front], towards[front])]] = 1.0
    return result


def _dot(a: Array, b: Array) -> Array:
    result: Array = np.einsum("nc,nc->n", a, b)[:, None]
    return result


def _length(a: Array) -> Array:
    result: Array = np.sqrt(_dot(a, a))
    return result


def expose(rng: np.random.Generator, radiance: Array) -> npt.NDArray[np.uint8]:
    """Linear radiance H x W x 3 to an 8-bit picture: exposure, white balance, noise, gamma."""
    level = float(np.quantile(radiance.mean(axis=-1), 0.8))
    gain = float(np.exp(rng.uniform(-2.0, -0.25))) / max(level, 1e-3)
    balance = 1 + rng.normal(0, 0.06, 3)
    lifted = radiance * (gain * balance)
    curved = 1.0 - np.exp(-1.6 * lifted)  # highlights roll off as on film
    noisy = curved ** (1 / rng.uniform(1.8, 2.4))
    noisy = noisy + rng.normal(0, rng.uniform(0.003, 0.03), radiance.shape)
    return (np.clip(noisy, 0, 1) * 255 + 0.5).astype(np.uint8)
