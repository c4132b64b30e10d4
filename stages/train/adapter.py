"""Teacher-Specific Adapter Path: a chain of small residual adapters beside the stem.

Shapes: `B` batch, `L` tokens (prefix tokens included), `D` stem width.
"""

from collections.abc import Sequence

from torch import Tensor, nn


def initialise_linear(module: nn.Module) -> None:
    """Draw every Linear inside from a truncated normal (std 0.02) with zero bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)


class Adapter(nn.Module):
    """A(z) = z + s W_up GELU(W_down z), with a learned scalar s (SAK section 3.2).

    Shapes: `B L D` in and out.
    """

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, max(1, width // ratio))
        self.act = nn.GELU()
        self.up = nn.Linear(max(1, width // ratio), width)
        self.scale = nn.Parameter(self.up.weight.new_ones(1))
        initialise_linear(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `B L D` tokens plus their learned correction."""
        correction: Tensor = self.up(self.act(self.down(tokens)))
        return tokens + self.scale * correction


def path_states(adapters: nn.ModuleList, stem_states: Sequence[Tensor]) -> list[Tensor]:
    """Run one path beside the stem: r_0 = A_0(x_0), r_l = A_l(r_{l-1} + x_l).

    `stem_states` are x_0 (embedded tokens) and the output x_l of every block, each `B L D`;
    the result is r_0 .. r_l in the same order. The stem never sees the path.
    """
    states: list[Tensor] = []
    for adapter, state in zip(adapters, stem_states, strict=True):
        states.append(adapter(states[-1] + state if states else state))
    return states
