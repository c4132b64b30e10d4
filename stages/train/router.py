"""Mixture-of-Representations: per level and task, a gate over the stem and the paths.

Shapes: `B` batch, `N` patch tokens, `D` stem width, `E` experts (the stem, then each teacher).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.train.adapter import initialise_linear

NOISE_FLOOR = 0.01


class GlobalRouter(nn.Module):
    """Scores the experts of a whole image from the stem's patch tokens: `B N D` to `B S`.

    The first E scores are the clean logits, E others, if any, the raw scale of the training noise.
    """

    def __init__(self, width: int, scores: int) -> None:
        super().__init__()
        self.module = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.LayerNorm(width // 2),
            nn.GELU(),
            nn.Linear(width // 2, scores),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `B S`: an MLP per token, then the mean over tokens.

        The last layer is linear, so the mean is taken before it: same result, less work.
        """
        hidden: Tensor = self.module[:3](tokens)
        scores: Tensor = self.module[3](hidden.mean(dim=1))
        return scores


class MixtureOfRepresentations(nn.Module):
    """Softmax gates over all experts, noisy in training (SAK section 3.3).

    One gate per image; in training each pixel draws its own noise around it, unless not `noisy`.
    """

    def __init__(self, width: int, experts: int, noisy: bool = True) -> None:
        super().__init__()
        self.noisy = noisy
        self.router = GlobalRouter(width, 2 * experts if noisy else experts)
        initialise_linear(self)

    def forward(self, stem: Tensor) -> Tensor:
        """Return the gates for `B N D` stem tokens: `B N E` in noisy training, else `B 1 E`."""
        scores: Tensor = self.router(stem)
        if not self.noisy:
            return scores.float().unsqueeze(1).softmax(dim=-1)
        clean, raw_noise = scores.float().unsqueeze(1).chunk(2, dim=-1)
        if self.training:
            shape = (stem.shape[0], stem.shape[1], clean.shape[-1])
            noise = torch.randn(shape, device=stem.device)
            clean = clean + noise * (F.softplus(raw_noise) + NOISE_FLOOR)
        return clean.softmax(dim=-1)


def mix(experts: Sequence[Tensor], gates: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return per task the sum of E experts `B N D`, weighted by its gates `B N E` (or `B 1 E`).

    All tasks in one product, which halves the time of one task after the other on a CPU.
    """
    mixed = torch.stack(tuple(gates), dim=2) @ torch.stack(tuple(experts), dim=2).float()
    return mixed.unbind(dim=2)
