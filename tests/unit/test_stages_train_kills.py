"""Runs killed by SIGKILL at drawn places and resumed end with the same bytes as whole ones."""

import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.train.testing import PLACES, Order, make_root, obey

PHASE = {"ema_decay": 0.7, "keep_last": 1, "accumulate": 2}
VISITS = {"gradient known": 7, "weights changed": 7, "file not yet on disk": 6, "file in place": 6}

Run = Callable[..., int]


@pytest.fixture(scope="module")
def run() -> Run:
    """Obey an order in a process of its own and return how it ended."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["stages.train.testing"])

    def start(order: Order) -> int:
        process = context.Process(target=obey, args=(order,))
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    return start


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module", params=[False, True], ids=["distill", "multitask"])
def whole(request: pytest.FixtureRequest, root: Path, run: Run) -> Order:
    folder = root / f"whole-{request.param}"
    order = Order(root=root, folder=folder, tasks=request.param, phase=PHASE)
    assert run(order) == 0
    return order


def drawn(seed: int, count: int) -> list[tuple[str, int]]:
    """Draw different moments out of all 26 that a run comes to."""
    every = [(place, visit) for place in sorted(PLACES) for visit in range(1, VISITS[place] + 1)]
    return random.Random(seed).sample(every, count)


def is_the_same_after(kill: tuple[str, int], whole: Order, run: Run, workers: int = 0) -> bool:
    folder = whole.folder.with_name("killed")
    order = replace(whole, folder=folder)
    try:
        assert run(replace(order, kill=kill)) == -signal.SIGKILL
        assert run(replace(order, phase={**PHASE, "workers": workers})) == 0
        names = ("student.safetensors", "student.json")
        found = {path.name for path in folder.iterdir()}
        assert found == {*names, "log.csv", "checkpoint-00000007.pt"}
        return all((folder / n).read_bytes() == (whole.folder / n).read_bytes() for n in names)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("kill", drawn(0, 3))
def test_killed_and_resumed_is_the_same_bit_for_bit(
    whole: Order, run: Run, kill: tuple[str, int]
) -> None:
    assert is_the_same_after(kill, whole, run)


@pytest.mark.slow  # twenty moments in each phase
@pytest.mark.parametrize("kill", drawn(1, 20))
def test_killed_at_twenty_moments(whole: Order, run: Run, kill: tuple[str, int]) -> None:
    assert is_the_same_after(kill, whole, run)


@pytest.mark.slow  # each loading process imports torch
def test_resumed_with_loading_processes(whole: Order, run: Run) -> None:
    assert is_the_same_after(("gradient known", 6), whole, run, workers=2)


@pytest.mark.slow  # the compiler takes a minute
def test_a_compiled_student_trains_as_the_plain_one(whole: Order, run: Run) -> None:
    """Here, in processes without the run-time types of these tests, which cannot be compiled.

    A bias before batch normalisation has no gradient but rounding, which Adam scales up to steps.
    """
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    compiled = replace(whole, folder=whole.folder.with_name("compiled"), runtime={"compile": True})
    assert run(compiled) == 0
    weights = [load_file(order.folder / "student.safetensors") for order in (whole, compiled)]
    shutil.rmtree(compiled.folder)
    assert weights[0].keys() == weights[1].keys()
    idle = (".linear_fuse.0.bias", ".linear_fuse.1.running_mean")
    compared = {name: value for name, value in weights[0].items() if not name.endswith(idle)}
    for name, value in compared.items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)
