"""One optimiser step: loss = sum over tasks of weight x task loss + alpha x distillation loss."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stages.train.config import PhaseConfig, RuntimeConfig
from stages.train.device import autocast
from stages.train.distributed import Ranks
from stages.train.losses import distillation_losses, task_losses
from stages.train.parts import cut
from stages.train.stream import Batch
from stages.train.student import Student
from stages.train.targets import TargetSource
from stages.train.trainable import trainable_weights

GRADIENT_NORM = "gradient_norm"


def loss_columns(tasks: Sequence[str], levels: Mapping[str, int]) -> list[str]:
    """Return the names of the losses that a step reports; `levels` counts those of each teacher."""
    columns = ["loss", *(f"loss_{task}" for task in tasks)]
    if levels:
        columns.append("distill")
    for teacher, count in levels.items():
        columns += [f"distill_{teacher}", *(f"distill_{teacher}.{k}" for k in range(count))]
    return columns


class Step:
    """Computes the gradient of a batch; the student is in place, on `device`, in training mode."""

    def __init__(
        self,
        student: Student,
        phase: PhaseConfig,
        runtime: RuntimeConfig,
        task_weights: Mapping[str, float],
        targets: TargetSource,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self._phase, self._runtime, self._device, self._ranks = phase, runtime, device, ranks
        self._task_weights, self._targets = dict(task_weights), targets
        self._student, self._weights = student, trainable_weights(student)
        self._forward: nn.Module = student
        if runtime.activation_checkpointing:
            student.vit.set_grad_checkpointing(True)
        if runtime.compile:
            student.compile(options={"fallback_random": True})  # the routers' noise as without
        if ranks.world > 1:
            self._forward = DistributedDataParallel(
                student, device_ids=[device] if device.type == "cuda" else None
            )

    def gradient(
        self, batch: Batch, step: int, scaler: torch.amp.GradScaler, rank: int | None = None
    ) -> dict[str, Tensor]:
        """Leave the (scaled) gradient of a step in the weights and return its terms, unweighted.

        The batch is on the device. `loss` is the weighted total; terms are those of this process's
        images. `rank` is given where another process's step is computed again.
        """
        torch.manual_seed(
            _step_seed(self._runtime.seed, step, self._ranks.rank if rank is None else rank)
        )
        for weight in self._weights:
            weight.grad = None
        parts = cut(batch, self._phase.accumulate)
        terms: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            with self._exchanging(number == len(parts)):
                found = self._losses(part)
                torch.autograd.backward(scaler.scale(found["loss"] / len(parts)))
            for name, value in found.items():
                share = value.detach() / len(parts)
                terms[name] = terms[name] + share if name in terms else share
        return terms

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient over all weights; the scaler's factor must be gone."""
        return nn.utils.get_total_norm([w.grad for w in self._weights if w.grad is not None])

    def clip(self, norm: Tensor) -> None:
        """Scale the gradient down to the norm that the settings allow."""
        if self._phase.gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(self._weights, self._phase.gradient_clip, norm)

    def _exchanging(self, last: bool) -> AbstractContextManager[None]:
        """Let the processes exchange gradients in the last part of a step only."""
        if last or not isinstance(self._forward, DistributedDataParallel):
            return nullcontext()
        return self._forward.no_sync()

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        targets = self._targets(batch)
        with autocast(self._device, self._runtime.precision):
            output = self._forward(batch.images, distillation=bool(targets))
        tasks = task_losses(output.tasks, batch.labels)
        teachers = distillation_losses(output.paths, targets)
        terms = {f"loss_{name}": loss for name, loss in tasks.items()}
        total = torch.zeros((), device=self._device)
        for name, loss in tasks.items():
            total = total + self._task_weights[name] * loss
        if teachers:
            terms["distill"] = torch.stack([levels.sum() for levels in teachers.values()]).sum()
            for name, levels in teachers.items():
                terms[f"distill_{name}"] = levels.sum()
                terms |= {f"distill_{name}.{k}": level for k, level in enumerate(levels)}
            total = total + self._phase.alpha * terms["distill"]
        return {"loss": total} | terms


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's random numbers, so that no generator's state must be kept."""
    digest = hashlib.blake2b(f"step/{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
