"""Ridge regression from normal equations, fed batch by batch.

Letters: N tokens of a batch, F features, K outputs.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class RidgeRegression:
    """Minimises mean |x W - y|^2 + ridge |W|^2 in closed form; the last feature is the constant.

    Memory is F x F whatever the number of tokens: products of a batch are taken in float32, added
    up and solved in float64. The constant, which must be 1 in every token, is not penalised.
    """

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        self.count = 0
        self._gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._cross = torch.zeros(features, outputs, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "N F"], y: Float[Tensor, "N K"]) -> None:
        """Count some tokens."""
        self._gram += x.T @ x
        self._cross += x.T @ y
        self.count += len(x)

    def solve(self, ridge: float) -> Float[Tensor, "F K"]:
        """Return W in float32; `ridge` is relative to features of variance 1 and must be above 0.

        Raises:
            ValueError: nothing was counted.
        """
        if self.count == 0:
            raise ValueError("a ridge regression needs at least one labelled token, got none")
        penalty = torch.full_like(self._gram[0], ridge * self.count)
        penalty[-1] = 0
        weights: Tensor = torch.linalg.solve(self._gram + penalty.diag(), self._cross)
        return weights.float()
