"""Whether features look like features: one pass over decoded rows, numbers per teacher and level.

Letters: `n` rows of a batch, `T` tokens of a row, `C` channels. Memory is one batch and, for every
row of the level, 16 bytes: its norm, its cosine and a hash that finds exact duplicates.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTLIER_Z = 10.0
"""Robust z-score from which a row is listed; features have heavier tails than a normal law."""

_LISTED = 10
_FEWEST_ROWS = 16  # fewer have no median worth the name


@dataclass(frozen=True, slots=True, kw_only=True)
class OddRow:
    """A row far from the others, as robust z-scores of its norm and of its cosine to the centre."""

    row: int
    norm_z: float
    cosine_z: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureNumbers:
    """What the features of a level are like.

    `non_finite` and `saturated` count values; `rms` is the root mean square of all values, `peak`
    the largest magnitude over it, in channel `peak_channel`; `top_share` is the share of the
    level's energy in its strongest channel (Sun et al. 2024, "Massive Activations"). `odd_rows`
    are the worst first; `duplicates` are groups of rows equal to the byte.
    """

    teacher: str
    level: str
    rows: int
    channels: int
    non_finite: int
    non_finite_rows: tuple[int, ...]
    saturated: int
    stored_values: int
    dead_channels: tuple[int, ...]
    rms: float
    peak: float
    peak_channel: int
    top_share: float
    zero_rows: tuple[int, ...]
    outliers: int
    odd_rows: tuple[OddRow, ...]
    duplicates: tuple[tuple[int, ...], ...]
    megabytes_per_second: float


def saturated(stored: NDArray[Any]) -> int:
    """Count values at the limit of their type: the largest float, either end of a signed code.

    Unsigned integers are packed codes, whose ends say nothing, and count as none.
    """
    if stored.dtype.kind == "f":
        return int(np.count_nonzero(np.abs(stored) >= np.finfo(stored.dtype).max))
    if stored.dtype.kind == "i":
        limits = np.iinfo(stored.dtype)
        # A symmetric code leaves the lowest value unused.
        return int(np.count_nonzero((stored <= -limits.max) | (stored == limits.max)))
    return 0


def centre_of(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the median row (C,) of some rows (n, ..., C), tokens averaged; NaN counts as zero."""
    tokens = np.nan_to_num(_tokens(values), posinf=0, neginf=0)
    centre: NDArray[np.float64] = np.median(tokens.mean(axis=1, dtype=float), axis=0)
    return centre


class LevelAudit:
    """Gathers the numbers of one level; `centre` (C,) is what rows are compared with."""

    def __init__(self, teacher: str, level: str, centre: NDArray[np.float64]) -> None:
        self._names = teacher, level
        self._centre = centre
        channels = len(centre)
        self._lowest = np.full(channels, np.inf)
        self._highest = np.full(channels, -np.inf)
        self._energy = np.zeros(channels)
        self._tokens = self._non_finite = self._saturated = self._stored = 0
        self._bytes, self._seconds = 0, 0.0
        self._bad_rows: list[int] = []
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(
        self,
        rows: NDArray[np.int64],
        values: NDArray[Any],
        stored: NDArray[Any] | None = None,
    ) -> None:
        """Add `rows` (n,) with their `values` (n, ..., C); `stored` are their codes, if they differ.

        Codes are looked at for saturation only.
        """
        started = time.perf_counter()
        if not len(rows):
            return
        codes = values if stored is None else stored
        self._saturated += saturated(codes)
        self._stored += codes.size
        tokens = self._finite(rows, _tokens(values))
        self._lowest = np.minimum(self._lowest, tokens.min(axis=(0, 1)))
        self._highest = np.maximum(self._highest, tokens.max(axis=(0, 1)))
        energy = np.einsum("ntc,ntc->nc", tokens, tokens).astype(float)
        self._energy += energy.sum(axis=0)
        self._tokens += tokens.shape[0] * tokens.shape[1]
        norms = np.sqrt(energy.sum(axis=1) / tokens[0].size)
        self._parts.append((rows, norms.astype(np.float32), self._cosines(tokens), _hashes(values)))
        self._bytes += values.nbytes
        self._seconds += time.perf_counter() - started

    def numbers(self) -> FeatureNumbers:
        """Return what was gathered; at least one row was added."""
        rows, norms, cosines, hashes = (
            np.concatenate([part[index] for part in self._parts]) for index in range(4)
        )
        outliers, odd = _odd_rows(rows, norms, cosines)
        rms = float(np.sqrt(self._energy.sum() / (self._tokens * len(self._energy))))
        magnitudes = np.maximum(self._highest, -self._lowest)
        return FeatureNumbers(
            teacher=self._names[0],
            level=self._names[1],
            rows=len(rows),
            channels=len(self._energy),
            non_finite=self._non_finite,
            non_finite_rows=tuple(self._bad_rows),
            saturated=self._saturated,
            stored_values=self._stored,
            dead_channels=self._dead(),
            rms=rms,
            peak=float(magnitudes.max()) / rms if rms else 0.0,
            peak_channel=int(magnitudes.argmax()),
            top_share=float(self._energy.max() / self._energy.sum()) if rms else 0.0,
            zero_rows=tuple(rows[norms == 0].tolist()),
            outliers=outliers,
            odd_rows=odd,
            duplicates=_equal_groups(rows[norms != 0], hashes[norms != 0]),
            megabytes_per_second=self._bytes / 1e6 / max(self._seconds, 1e-9),
        )

    def _dead(self) -> tuple[int, ...]:
        """Channels that never change; a single token says nothing."""
        same = (self._lowest == self._highest) & (self._tokens > 1)
        return tuple(np.flatnonzero(same).tolist())

    def _finite(self, rows: NDArray[np.int64], tokens: NDArray[Any]) -> NDArray[Any]:
        """Count NaN and infinity, and return the tokens with zeros instead."""
        wrong = ~np.isfinite(tokens)
        if not wrong.any():
            return tokens
        self._non_finite += int(wrong.sum())
        self._bad_rows += rows[wrong.any(axis=(1, 2))].tolist()
        return np.where(wrong, tokens.dtype.type(0), tokens)

    def _cosines(self, tokens: NDArray[Any]) -> NDArray[np.float32]:
        means = tokens.mean(axis=1, dtype=float)
        scale = np.linalg.norm(means, axis=1) * np.linalg.norm(self._centre)
        dots = means @ self._centre
        cosines: NDArray[np.float64] = np.zeros_like(dots)
        np.divide(dots, scale, out=cosines, where=scale > 0)
        return cosines.astype(np.float32)


def robust_z(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return (n,) distances from the median in units of the spread.

    The spread is the median absolute deviation, or the mean one where that is zero, each scaled to
    a normal law's standard deviation (Iglewicz and Hoaglin 1993, "How to detect outliers").
    """
    distance = values.astype(float) - np.median(values)
    spread = 1.482602 * np.median(np.abs(distance)) or 1.253314 * np.abs(distance).mean()
    return distance / spread if spread else np.zeros_like(distance)


def _tokens(values: NDArray[Any]) -> NDArray[Any]:
    """(n, ..., C) -> (n, T, C), at least float32: float16 squares overflow."""
    dtype = np.result_type(values.dtype, np.float32)
    return values.reshape(len(values), -1, values.shape[-1]).astype(dtype)


def _hashes(values: NDArray[Any]) -> NDArray[np.uint64]:
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in values]
    return np.frombuffer(b"".join(digests), np.uint64)


def _odd_rows(
    rows: NDArray[np.int64], norms: NDArray[Any], cosines: NDArray[Any]
) -> tuple[int, tuple[OddRow, ...]]:
    if len(rows) < _FEWEST_ROWS:
        return 0, ()
    norm_z, cosine_z = robust_z(norms), robust_z(cosines)
    worst = np.maximum(np.abs(norm_z), -cosine_z)  # nearer to the centre than others is no fault
    order = np.argsort(-worst, kind="stable")[: min(_LISTED, int((worst > OUTLIER_Z).sum()))]
    odd = tuple(
        OddRow(row=int(rows[i]), norm_z=float(norm_z[i]), cosine_z=float(cosine_z[i]))
        for i in order
    )
    return int((worst > OUTLIER_Z).sum()), odd


def _equal_groups(
    rows: NDArray[np.int64], hashes: NDArray[np.uint64]
) -> tuple[tuple[int, ...], ...]:
    order = np.argsort(hashes, kind="stable")
    edges = np.flatnonzero(np.diff(hashes[order])) + 1
    groups: Sequence[NDArray[np.int64]] = np.split(rows[order], edges)
    return tuple(tuple(group.tolist()) for group in groups if len(group) > 1)
