"""How near a student's paths come to their teachers, and how many directions features use.

Letters: N tokens, X Y channels of the two sides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from stages.evaluate.features import FeatureSource, Key
from stages.progress import Progress
from stages.train.losses import on_one_grid

_EPSILON = 1e-7  # of RankMe's definition


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityScore:
    """One level of a path against its teacher: per token the cosine, over all tokens CKA."""

    teacher: str
    level: str
    cosine_mean: float
    cosine_p01: float
    """First percentile of the tokens' cosines."""
    cka: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankScore:
    """RankMe of a level's tokens, between 1 and its channels."""

    teacher: str
    level: str
    rank: float
    channels: int


class LinearAlignment:
    """Linear CKA of two sets of tokens, fed batch by batch (Kornblith et al. 2019, equation 4).

    |Y'X|^2 / (|X'X| |Y'Y|) with centred columns and Frobenius norms; 1 where one side is a rotated,
    scaled and shifted copy of the other. NaN where one side never changes.
    """

    def __init__(self, x: int, y: int, device: torch.device) -> None:
        self._count, self._x = 0, x
        self._sums = torch.zeros(x + y, dtype=torch.float64, device=device)
        self._products = torch.zeros(x + y, x + y, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "N X"], y: Float[Tensor, "N Y"]) -> None:
        """Count some tokens."""
        both = torch.cat([x, y], dim=1).double()
        self._count += len(both)
        self._sums += both.sum(dim=0)
        self._products += both.T @ both

    def compute(self) -> float:
        """Return CKA over all that was counted."""
        mean = self._sums / self._count
        centred = self._products - self._count * torch.outer(mean, mean)
        inner, outer, cross = (
            centred[: self._x, : self._x],
            centred[self._x :, self._x :],
            centred[: self._x, self._x :],
        )
        scale = inner.norm() * outer.norm()
        return (cross.norm() ** 2 / scale).item() if scale > 0 else math.nan


def rank_me(products: Float[Tensor, "C C"]) -> float:
    """Return the exponential of the entropy of singular values, from Z'Z of N x C features Z.

    RankMe of Garrido et al. 2023, equation 1; features are not centred.
    """
    singular = torch.linalg.eigvalsh(products.double()).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=_EPSILON) + _EPSILON
    return math.exp(-(shares * shares.log()).sum().item())


def fidelity(
    paths: FeatureSource,
    teachers: FeatureSource,
    pairs: Mapping[Key, Key],
    ids: Sequence[str],
    *,
    batch_size: int,
    progress: Progress,
) -> tuple[FidelityScore, ...]:
    """Compare levels of `paths` with those of `teachers` that `pairs` names, over some images.

    Different grids meet on the one with more rows, as in the distillation loss. Where widths
    differ, cosines are NaN: only CKA compares such features.
    """
    progress.start("fidelity", len(ids))
    cosines: dict[Key, list[Tensor]] = {key: [] for key in pairs}
    alignments: dict[Key, LinearAlignment] = {}
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        found, wanted = paths.read(chunk), teachers.read(chunk)
        for key, other in pairs.items():
            maps = on_one_grid(found[key], wanted[other])
            x, y = (one.flatten(0, 2) for one in maps)
            alignment = alignments.setdefault(
                key, LinearAlignment(x.shape[1], y.shape[1], x.device)
            )
            alignment.add(x, y)
            if x.shape == y.shape:
                cosines[key].append(F.cosine_similarity(x, y, dim=1).cpu())
        progress.advance(len(chunk))
    return tuple(
        FidelityScore(
            teacher=other[0],
            level=other[1],
            **_summary(cosines[key]),
            cka=alignments[key].compute(),
        )
        for key, other in pairs.items()
    )


def ranks(
    source: FeatureSource, ids: Sequence[str], *, batch_size: int, progress: Progress
) -> tuple[RankScore, ...]:
    """Return RankMe of every level, over all tokens of some images."""
    progress.start("rank", len(ids))
    products: dict[Key, Tensor] = {}
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        for key, level in source.read(chunk).items():
            tokens = level.flatten(0, 2).double()
            products[key] = products.get(key, 0) + tokens.T @ tokens
        progress.advance(len(chunk))
    return tuple(
        RankScore(teacher=key[0], level=key[1], rank=rank_me(found), channels=len(found))
        for key, found in products.items()
    )


def _summary(cosines: Sequence[Tensor]) -> dict[str, float]:
    if not cosines:
        return {"cosine_mean": math.nan, "cosine_p01": math.nan}
    every = torch.cat(list(cosines)).numpy()
    return {"cosine_mean": float(every.mean()), "cosine_p01": float(np.percentile(every, 1))}
