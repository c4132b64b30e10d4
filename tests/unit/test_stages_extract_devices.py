"""How batches are computed follows the device of the teacher, not what else the machine has."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.data.view import Box
from stages.extract.clock import StageClock
from stages.extract.config import TeacherConfig
from stages.extract.devices import (
    Computing,
    answer,
    computing,
    device_of,
    on_gpu,
    pinned_for,
    streams_of,
    wait_for,
)
from stages.extract.portions import Portions
from stages.extract.teachers import Features, load_teacher
from store.spec import TeacherSpec
from store.testing import sample_teacher

CONFIG = TeacherConfig(source="timm:test_vit", checkpoint="random", levels=2)


@dataclass(kw_only=True)
class Somewhere:
    """What is asked of a teacher to know how to compute with it."""

    device: torch.device
    reentrant: bool = True
    spec: TeacherSpec = field(default_factory=sample_teacher)

    def preprocess(self, image: np.ndarray, box: Box) -> Tensor:
        raise NotImplementedError

    def __call__(self, images: Tensor) -> Features:
        raise NotImplementedError


def somewhere(name: str) -> Portions:
    return Portions(Somewhere(device=torch.device(name)))


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_cuda_device_has_one_stream_pinned_batches_and_its_own_clock(name: str) -> None:
    expected = Computing(streams=1, pinned=True, events=True)
    assert computing(torch.device(name), reentrant=True, threads=8) == expected


@pytest.mark.parametrize(
    ("device", "reentrant", "threads", "streams"),
    [("cpu", True, 2, 2), ("cpu", True, 1, 1), ("cpu", False, 8, 1), ("mps", True, 8, 1)],
)
def test_other_devices_have_neither(
    device: str, reentrant: bool, threads: int, streams: int
) -> None:
    found = computing(torch.device(device), reentrant=reentrant, threads=threads)
    assert found == Computing(streams=streams, pinned=False, events=False)


def test_several_teachers_go_by_the_most_careful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert streams_of([somewhere("cpu")]) == 2
    assert streams_of([somewhere("cpu"), somewhere("cuda:1")]) == 1
    assert on_gpu([somewhere("cpu"), somewhere("cuda:1")])
    assert not on_gpu([somewhere("cpu")])


def test_a_processor_is_used_as_one_on_a_machine_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = Portions(load_teacher("vit", CONFIG, (32, 48), torch.device("cpu")))
    assert device_of(teacher) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    images, clock = torch.zeros(2, 32, 48, 3, dtype=torch.uint8), StageClock()
    assert pinned_for(teacher, images) is images
    _, events = answer(teacher, images, clock)
    wait_for(events, clock)
    assert events is None
    assert clock.seconds.keys() == {"forward"}
