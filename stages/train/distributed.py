"""Several processes that train one student together, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stages.train.device import DeviceError, pick_device


class RanksError(ValueError):
    """The processes cannot share the work as asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Which of how many processes this one is; a run without torchrun is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Number of this process on its machine."""

    @property
    def first(self) -> bool:
        """Whether this process writes what there is to write."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over all processes; each must call it."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier()

    def share(self, batch_size: int, accumulate: int) -> int:
        """Return how many of a step's images are this process's, in `accumulate` equal parts.

        Raises:
            RanksError: the parts would not be equal.
        """
        unit = self.world * accumulate
        if batch_size % unit:
            raise RanksError(
                f"batch_size {batch_size} cannot be cut into equal parts for {self.world} processes "
                f"times accumulate {accumulate}; set it to a multiple of {unit}, such as "
                f"{max(1, batch_size // unit) * unit}, or start another number of processes"
            )
        return batch_size // self.world

    def device(self, name: str) -> torch.device:
        """Return this process's device: with several on a machine, the GPU of its number.

        Raises:
            DeviceError: no such device, or one GPU for all processes.
        """
        chosen = pick_device(name)
        if self.world == 1 or chosen.type != "cuda":
            return chosen
        if chosen.index is not None:
            raise DeviceError(
                f"runtime.device {name!r} is one GPU, for {self.world} processes; use 'auto'"
            )
        if self.local >= torch.cuda.device_count():
            raise DeviceError(
                f"process {self.local} of this machine finds {torch.cuda.device_count()} GPUs; "
                "start as many processes as there are GPUs, or use runtime.device 'cpu'"
            )
        chosen = torch.device("cuda", self.local)
        torch.cuda.set_device(chosen)
        return chosen


ALONE = Ranks()


def this_rank() -> Ranks:
    """Return what torchrun says about this process in its environment."""
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
        local=int(os.environ.get("LOCAL_RANK", "0")),
    )


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started, if it did: NCCL on GPUs, gloo elsewhere."""
    ranks = this_rank()
    if ranks.world == 1:
        yield ranks
        return
    backend = "nccl" if ranks.device(device).type == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
