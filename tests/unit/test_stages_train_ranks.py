"""Several processes of torchrun train as one does, and share every epoch's images."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.train.testing import Order, as_json, as_rank, make_root, obey

IMAGES = 12
PHASE = {"batch_size": 6, "steps": 8, "log_every": 1, "ema_decay": 0.5, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("root"), images=IMAGES + 3)


def torchrun(order: Order, ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "stages.train.testing", as_json(order)]
    quiet = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def processes(order: Order, ranks: int) -> None:
    """Do as torchrun does, with processes that need not import torch first."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["stages.train.testing"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    started = []
    for rank in range(ranks):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(context.Process(target=as_rank, args=(order, environment)))
        started[-1].start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * ranks


def alone(order: Order) -> None:
    threads = torch.get_num_threads()
    obey(order)
    torch.set_num_threads(threads)


def seen(order: Order) -> list[tuple[int, int, list[str]]]:
    """Return step, rank and images of every line that the processes wrote."""
    assert order.seen is not None
    lines = map(json.loads, order.seen.read_text().splitlines())
    return [(line["step"], line["rank"], line["ids"]) for line in lines]


def weights(order: Order) -> dict[str, Tensor]:
    return load_file(order.folder / "student.safetensors")


def ordered(root: Path, name: str, **phase: object) -> Order:
    return Order(root=root, folder=root / name, phase={**PHASE, **phase}, seen=root / f"{name}.txt")


def assert_same_training(one: Order, other: Order) -> None:
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-3, atol=2e-5)
    logs = [(order.folder / "log.csv").read_text().splitlines() for order in (one, other)]
    assert len(logs[0]) == len(logs[1]) == 9
    columns = logs[0][0].split(",")
    for first, second in zip(logs[0][1:], logs[1][1:], strict=True):
        rows = [dict(zip(columns, line.split(","), strict=True)) for line in (first, second)]
        for name in ("loss", "distill_dino.1", "gradient_norm"):
            assert float(rows[1][name]) == pytest.approx(float(rows[0][name]), rel=1e-3)


def test_ranks_train_as_one_process_and_may_change_in_mid_epoch(root: Path) -> None:
    """Three steps by two processes, two by three, the others by one; accumulating on the way."""
    whole, shared = ordered(root, "whole"), ordered(root, "shared")
    alone(whole)
    processes(replace(shared, stop_after=3), ranks=2)
    processes(replace(shared, stop_after=2), ranks=3)
    alone(replace(shared, phase={**shared.phase, "accumulate": 3}))
    assert_same_training(whole, shared)
    lines = seen(shared)
    worlds = {step: sorted(rank for at, rank, _ in lines if at == step) for step in range(8)}
    assert worlds == {
        step: [0, 1] if step < 3 else [0, 1, 2] if step < 5 else [0] for step in range(8)
    }
    for epoch in range(8 * 6 // IMAGES):
        steps = range(epoch * 2, epoch * 2 + 2)
        counts = Counter(one for step, _, ids in lines if step in steps for one in ids)
        assert len(counts) == IMAGES
        assert set(counts.values()) == {1}
    for step, _, ids in seen(whole):
        parts = sorted((rank, some) for at, rank, some in lines if at == step)
        assert [one for _, some in parts for one in some] == ids


def test_torchrun_starts_them(root: Path) -> None:
    """With the steps in another order of sums, so equal but for rounding."""
    whole, shared = ordered(root, "plain", steps=2), ordered(root, "torchrun", steps=2)
    alone(whole)
    torchrun(shared, ranks=2)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(shared)[name], value, rtol=1e-3, atol=2e-5)
    assert sorted((step, rank) for step, rank, _ in seen(shared)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert not list(shared.folder.glob(".*"))
