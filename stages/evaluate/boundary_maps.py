"""Boundary maps before they are matched: non-maximum suppression, thresholds, thinning.

The protocol is that of the published multi-task tables (SEISM with Piotr Dollar's edge toolbox):
the probability map, kept in 8 bits, is smoothed, suppressed across the edge's direction, and thinned
at each of 99 thresholds. Letters: H W pixels.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, map_coordinates
from skimage.morphology import thin

THRESHOLDS: NDArray[np.float64] = np.arange(1, 100) / 100
"""Probabilities at and above which a pixel is boundary."""
_SMOOTHING, _DIRECTION = 1, 4  # radii of triangle filters, in pixels
_BORDER = 5  # pixels along which boundaries fade out
_LEAD = 1.01  # a maximum may be smaller than its neighbour by this factor


def suppress(probability: UInt8[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Keep maxima across the edge: float32 probabilities 0..1, 0 where a neighbour is stronger.

    The direction of an edge is that of the second derivatives of the smoothed map; a pixel is
    compared with bilinear values one pixel to either side.
    """
    strength = _triangle(probability.astype(np.float32) / np.float32(255), _SMOOTHING)
    direction = _direction(_triangle(strength, _DIRECTION))
    rows, columns = np.indices(strength.shape, np.float32)
    kept = strength.copy()
    for side in (-1, 1):
        at = [rows + side * np.sin(direction), columns + side * np.cos(direction)]
        beside = map_coordinates(strength, at, order=1, mode="nearest")
        kept[strength * _LEAD < beside] = 0
    return kept * _fading(strength.shape)


def boundary_pixels(
    suppressed: Float[np.ndarray, "H W"], threshold: float
) -> Bool[np.ndarray, "H W"]:
    """Return lines one pixel wide where the map reaches a threshold (above 0)."""
    pixels: NDArray[np.bool_] = thin(suppressed >= threshold)  # type: ignore[no-untyped-call]
    return pixels


def _triangle(values: NDArray[np.float32], radius: int) -> NDArray[np.float32]:
    """Smooth along both axes with weights 1, 2 .. radius + 1 .. 2, 1; borders are mirrored."""
    rising = np.arange(1, radius + 2, dtype=np.float32)
    weights = np.concatenate([rising, rising[-2::-1]]) / (radius + 1) ** 2
    for axis in (0, 1):
        values = correlate1d(values, weights, axis=axis, mode="reflect")
    return values


def _direction(smooth: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the angle across the edge, in radians from the columns' axis."""
    down, right = np.gradient(smooth)
    right_right = np.gradient(right, axis=1)
    down_down, down_right = np.gradient(down)
    # the toolbox has sign(0) = 0, which takes exactly horizontal edges for vertical ones
    with np.errstate(divide="ignore"):  # a slope without end has an angle, too
        slope = down_down * np.where(down_right > 0, -1, 1) / (right_right + 1e-5)
    angle: NDArray[np.float32] = np.mod(np.arctan(slope), np.pi).astype(np.float32)
    return angle


def _fading(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return factors 0, 1/5 .. 4/5 towards each border, 1 elsewhere."""
    factors = []
    for side in shape:
        border = min(_BORDER, side // 2)
        distance = np.minimum(np.arange(side), np.arange(side)[::-1])
        factors.append(np.minimum(distance / max(border, 1), 1) if border else np.ones(side))
    return np.outer(*factors).astype(np.float32)
