"""Fits a teacher's codecs to sample rows and measures on other rows what they lose.

Only tokens are kept, as many from every row, so that memory does not grow with the rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs import Codec
from store.errors import StoreError
from store.fit import fit_codec, stack
from store.pyramid import area_average
from store.spec import Target, TeacherSpec
from store.values import check_values

MAX_TOKENS = 32_768
"""Tokens of a target that are kept for fitting, and again as many for measuring."""

_Tiles = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """What is left of tokens after encoding and decoding, on rows that were not fitted to.

    Cosine similarity of a token (all its channels; tokens of zeros left out, they have no
    direction) with what is decoded, mean and 1st percentile;
    norm of the error of all tokens over the norm of all tokens.
    """

    cosine_mean: float
    cosine_p01: float
    relative_l2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTarget:
    """A codec and what it loses."""

    codec: Codec
    fidelity: Fidelity


@dataclass(slots=True)
class _Sample:
    """Tiles of T x T tokens, gathered row by row."""

    tiles: list[_Tiles] = field(default_factory=list)
    rows: int = 0
    kept: int = 0

    def add(self, row: NDArray[np.float32], edge: int, share: float, seed: int) -> None:
        """Keep tiles of a row (H, W, C), up to `share` of MAX_TOKENS a row so far and no more.

        Which ones depends on `seed` alone. A row may come without any, the first one never does.
        """
        self.rows += 1
        most = MAX_TOKENS // edge**2
        count = min(most, math.ceil(most * self.rows * share)) - self.kept
        height, width, channels = row.shape
        grid = row.reshape(height // edge, edge, width // edge, edge, channels).swapaxes(1, 2)
        every = grid.reshape(-1, edge, edge, channels)
        chosen = np.random.default_rng(seed).permutation(len(every))[:count]
        self.tiles.append(every[np.sort(chosen)])
        self.kept += len(chosen)


class Calibration:
    """Gathers tokens of every target of a teacher; then fits any codec, any number of times.

    `rows` is how many rows will be added to both halves, to spread the tokens evenly over them.

    Raises:
        StoreError: fewer than two rows, one for either half.
    """

    def __init__(self, spec: TeacherSpec, rows: int) -> None:
        if rows < 2:
            raise StoreError(f"a codec is fitted to rows and measured on others, got {rows} in all")
        self.spec = spec
        self._rows = rows
        self._fitted = {target.name: _Sample() for target in spec.targets}
        self._held_out = {target.name: _Sample() for target in spec.targets}
        self._added = 0

    def add(self, levels: Mapping[str, NDArray[np.floating[Any]]], *, held_out: bool) -> None:
        """Take one row, (H, W, C) of each level by name, to fit to or to measure on.

        Raises:
            StoreError: the row holds NaN or infinity.
        """
        samples = self._held_out if held_out else self._fitted
        for target in self.spec.targets:
            row = np.asarray(levels[target.level], np.float32)
            where = f"calibration, level {target.level!r}"
            check_values(row[None], np.ones(1, bool), self._added, where, np.inf)
            averaged = area_average(row, target.grid)
            samples[target.name].add(averaged, tile_edge(target), 1 / self._rows, self._added)
        self._added += 1

    def held_out_tokens(self, target: Target) -> int:
        """Return how many tokens of a target the fidelity is measured on."""
        return sum(tiles[..., 0].size for tiles in self._held_out[target.name].tiles)

    def fit(self, codec: str) -> dict[str, FittedTarget]:
        """Return the codec of every target, by target name.

        Raises:
            StoreError: no such codec, no rows, or a target that it cannot serve.
        """
        return {target.name: self.fit_target(codec, target) for target in self.spec.targets}

    def fit_target(self, codec: str, target: Target) -> FittedTarget:
        """Return the codec of one target.

        Raises:
            StoreError: see `fit`.
        """
        fitted, held_out = self.tokens(target)
        found = fit_codec(codec, fitted)
        return FittedTarget(codec=found, fidelity=measure(found, held_out))

    def tokens(self, target: Target) -> tuple[_Tiles, _Tiles]:
        """Return the tiles (S, T, T, C) of a target to fit to, and those to measure on.

        Raises:
            StoreError: there are none of one kind.
        """
        samples = self._fitted[target.name], self._held_out[target.name]
        if not all(sample.tiles for sample in samples):
            raise StoreError("a codec needs rows to fit to and others to measure on")
        fitted, held_out = (np.concatenate(sample.tiles) for sample in samples)
        return fitted, held_out


def tile_edge(target: Target) -> int:
    """Return the largest of 4, 2, 1 that divides both sides of the target's grid."""
    height, width = target.grid
    return next(edge for edge in (4, 2, 1) if height % edge == 0 and width % edge == 0)


def measure(codec: Codec, tiles: _Tiles) -> Fidelity:
    """Return what a codec loses on tokens (S, T, T, C)."""
    row = stack(tiles)
    decoded = codec.decode(codec.encode(row)).astype(np.float64)
    exact = row.astype(np.float64)
    norms = np.linalg.norm(exact, axis=-1) * np.linalg.norm(decoded, axis=-1)
    cosines = (exact * decoded).sum(axis=-1) / np.where(norms > 0, norms, 1)
    cosines[(exact == decoded).all(axis=-1)] = 1.0  # not 1 less a rounding error
    directed = cosines[exact.any(axis=-1)]  # tokens of zeros have no direction to lose
    cosines = directed if directed.size else np.ones(1)
    whole = np.linalg.norm(exact)
    return Fidelity(
        cosine_mean=float(cosines.mean()),
        cosine_p01=float(np.quantile(cosines, 0.01)),
        relative_l2=float(np.linalg.norm(exact - decoded) / whole) if whole > 0 else 0.0,
    )
