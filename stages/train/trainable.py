"""Which weights learn: all, all but the stem, low-rank changes of the stem, or routers and heads.

The published code has the same four: its stem is trained, frozen or given low-rank changes in the
first phase, and `freeze` leaves only routers and heads to the second.
"""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stages.train.config import PhaseConfig
from stages.train.stem import StudentError
from stages.train.student import Student


class LowRank(nn.Module):
    """W + up down, with `up` (out, r) starting at zero and `down` (r, in) (Hu et al. 2021).

    Their factor alpha / r is 1 here.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return weight + self.up @ self.down


def choose_trainable(student: Student, phase: PhaseConfig) -> None:
    """Freeze what `phase.trainable` leaves out; adds the low-rank changes where it asks for them.

    Raises:
        StudentError: nothing would be left to train.
    """
    match phase.trainable:
        case "frozen-stem":
            student.vit.requires_grad_(False)
        case "lora-stem":
            student.vit.requires_grad_(False)
            _add_low_rank(student.vit, phase.lora_rank)
        case "routers":
            student.requires_grad_(False)
            student.mor.requires_grad_(True)
            student.heads.requires_grad_(True)
    if not any(weight.requires_grad for weight in student.parameters()):
        raise StudentError(
            f"trainable: {phase.trainable} leaves nothing to train: this student has neither "
            "routers nor heads; set trainable: all"
            if phase.trainable == "routers"
            else f"trainable: {phase.trainable} leaves nothing to train: this student is a stem "
            "alone; set trainable: all"
        )


def trainable_weights(student: nn.Module) -> list[nn.Parameter]:
    """Return the weights that learn."""
    return [weight for weight in student.parameters() if weight.requires_grad]


def merged(student: Student) -> Student:
    """Return a copy whose low-rank changes are part of the ordinary weights, all of them trainable."""
    copy = deepcopy(student)
    for module in list(copy.modules()):
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return copy.requires_grad_(True)


def _add_low_rank(vit: nn.Module, rank: int) -> None:
    """Give every linear layer of the blocks a low-rank change."""
    blocks = vit.get_submodule("blocks")
    linears = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for linear in linears:
            parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank))
