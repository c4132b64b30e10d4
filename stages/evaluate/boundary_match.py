"""Which pixels of two boundary maps correspond, each with one of the other at most.

BSDS matches at minimum cost, where leaving a pixel alone costs a hundred times the largest distance:
a matching of as many pixels as possible, and among those a short one. `match` is of as many pixels
as possible, by scipy's Hopcroft-Karp, which tries near pixels first; `match_exactly` is at minimum
cost, by scipy's sparse assignment, and far slower. Letters: N M pixels of the two maps, P pairs.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.sparse import block_array, csr_array, diags_array
from scipy.sparse.csgraph import maximum_bipartite_matching, min_weight_full_bipartite_matching
from scipy.spatial import KDTree

_ALONE = 100.0  # times the largest distance: what an unmatched pixel costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Pixels that are near enough to be matched, nearest pairs first."""

    points: int
    """Pixels of the first map (N)."""
    others: int
    """Pixels of the second map (M)."""
    point: Int[np.ndarray, "P"]
    other: Int[np.ndarray, "P"]
    distance: Float[np.ndarray, "P"]

    def of(self, chosen: Bool[np.ndarray, "N"]) -> "Pairs":
        """Return the pairs of some points of the first map, which are numbered anew."""
        kept = chosen[self.point]
        number = np.cumsum(chosen) - 1
        return Pairs(
            points=int(chosen.sum()),
            others=self.others,
            point=number[self.point[kept]],
            other=self.other[kept],
            distance=self.distance[kept],
        )


def near_pairs(
    points: Int[np.ndarray, "N 2"], others: Int[np.ndarray, "M 2"], distance: float
) -> Pairs:
    """Return all pairs no further apart than `distance` pixels."""
    empty = not len(points) or not len(others)
    found = (
        np.empty(0, [("i", np.intp), ("j", np.intp), ("v", np.float64)])
        if empty
        else KDTree(points).sparse_distance_matrix(
            KDTree(others), distance + 1e-9, output_type="ndarray"
        )
    )
    found = found[np.lexsort((found["j"], found["i"], found["v"]))]
    return Pairs(
        points=len(points),
        others=len(others),
        point=found["i"],
        other=found["j"],
        distance=found["v"],
    )


def match(pairs: Pairs) -> Bool[np.ndarray, "N"]:
    """Return which points are matched; so many of the others are matched, too.

    The smaller map looks for partners: those of the larger that cannot have one are never tried.
    """
    if pairs.points <= pairs.others:
        graph = _graph(pairs.point, pairs.other, pairs.points, pairs.others)
        partners: NDArray[np.int32] = maximum_bipartite_matching(graph, perm_type="column")
    else:
        graph = _graph(pairs.other, pairs.point, pairs.others, pairs.points)
        partners = maximum_bipartite_matching(graph, perm_type="row")
    return partners >= 0


def match_exactly(pairs: Pairs, distance: float) -> Bool[np.ndarray, "N"]:
    """Return which points are matched at minimum cost, as BSDS defines it.

    Each pixel may be matched with a stand-in of its own at the cost of being alone; stand-ins of a
    pair that is matched are matched with each other for nothing, so that a full matching exists.
    """
    rows, columns = pairs.points, pairs.others
    if not len(pairs.point):
        return np.zeros(rows, bool)
    places = (pairs.point, pairs.other)  # distances plus 1: scipy takes no explicit zeros
    near = csr_array((pairs.distance + 1, places), shape=(rows, columns))
    free = csr_array((np.ones(len(pairs.point)), places[::-1]), shape=(columns, rows))
    alone = _ALONE * distance + 1
    whole = block_array(
        [
            [near, diags_array(np.full(rows, alone))],
            [diags_array(np.full(columns, alone)), free],
        ],
        format="csr",
    )
    _, partners = min_weight_full_bipartite_matching(whole)
    found: NDArray[np.bool_] = partners[:rows] < columns
    return found


def _graph(row: NDArray[np.intp], column: NDArray[np.intp], rows: int, columns: int) -> csr_array:
    """Lay pairs out by rows, the entries of a row in the order of the pairs."""
    order = np.argsort(row, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int32)
    entries = (np.ones(len(row), np.int8), column[order].astype(np.int32), starts)
    return csr_array(entries, shape=(rows, columns))
