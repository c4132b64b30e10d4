"""`sak extract-teachers` on a running dask scheduler, and ended by signals while workers are at it.

Workers load a script that cuts shards of two rows and, where it is told to, has the first unit of a
worker wait for a file.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from store.testing import file_contents

COMMAND = """
import sys
import torch
torch.set_num_threads(1)
import store.teacher_layout
from pipeline.cli import app
store.teacher_layout.MAX_ROWS_PER_SHARD = 2
app(sys.argv[1:])
"""
PRELOAD = """
import os, time
from pathlib import Path
import store.teacher_layout
from store.pending import PendingShard

store.teacher_layout.MAX_ROWS_PER_SHARD = 2
if not hasattr(PendingShard, "originals"):  # dask runs this script twice, in one module
    PendingShard.originals = PendingShard.append, PendingShard.commit
append, commit = PendingShard.originals
marks = Path(os.environ["MARKS"])
name = os.environ.get("NAME", "")

def waiting(self, *arguments):
    (marks / f"begun{name}").touch()
    for _ in range(6000):
        if (marks / os.environ["WAIT_FOR"]).exists():
            break
        time.sleep(0.01)
    append(self, *arguments)

def noted(self):
    commit(self)
    (marks / f"committed{name}").touch()

if os.environ.get("WAIT_FOR"):
    PendingShard.append = waiting
PendingShard.commit = noted
"""
IMAGES = 11
SHARDS = 6


class Project:
    """Two stores of the same pictures, one of them extracted without a fault."""

    def __init__(self, folder: Path, params: dict[str, Any]) -> None:
        self.folder, self._params = folder, params
        self.marks = folder / "marks"
        self.marks.mkdir()
        self.preload = folder / "preload.py"
        self.preload.write_text(PRELOAD)

    def command(self, name: str, step: str, *options: str) -> list[str]:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**self._params, "store": str(self.store(name))}))
        return [sys.executable, "-c", COMMAND, step, *options, "--json", "--params", str(path)]

    def run(self, name: str, step: str, *options: str) -> dict[str, Any]:
        done = subprocess.run(
            self.command(name, step, *options), check=True, capture_output=True, timeout=300
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def store(self, name: str) -> Path:
        return self.folder / name / "features.zarr"

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "MARKS": str(self.marks), "OMP_NUM_THREADS": "1", **more}

    def wait_for(self, mark: str, *processes: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 240
        while not (self.marks / mark).exists():
            assert all(one.poll() is None for one in processes), "a process ended too early"
            assert time.monotonic() < deadline, f"no {mark}"
            time.sleep(0.02)


@pytest.fixture
def project(tiny_params: Path, tmp_path: Path) -> Project:
    params = yaml.safe_load(tiny_params.read_text())
    del params["teachers"]["second"]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (40 + number, 60, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    params["extract"]["equivariance_images"] = 0
    params |= {"data": {"kind": "folder", "root": str(pictures)}, "tasks": []}
    made = Project(tmp_path, params)
    made.run("whole", "index")
    shutil.copytree(tmp_path / "whole", tmp_path / "shared")
    made.run("whole", "extract-teachers")
    return made


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    """Ends what a test has started."""
    with ExitStack() as stack:
        yield stack


def start(
    processes: ExitStack, command: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a process in a group, working folder and temporary folder of its own."""
    (folder / "tmp").mkdir(parents=True)
    errors = processes.enter_context((folder / "errors.txt").open("wb"))
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**environment, "TMPDIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
    )

    def end() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    processes.callback(end)
    return process


def dask(program: str, *options: str) -> list[str]:
    return [sys.executable, "-m", f"distributed.cli.dask_{program}", *options, "--no-dashboard"]


def test_a_scheduler_with_workers_of_two_machines_one_of_which_joins_late(
    project: Project, processes: ExitStack, tmp_path: Path
) -> None:
    contact = tmp_path / "scheduler.json"
    options = ["--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(contact)]
    scheduler = start(
        processes, dask("scheduler", *options), tmp_path / "machine", project.environment()
    )
    deadline = time.monotonic() + 120
    while not contact.exists():
        assert scheduler.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)

    def worker(name: str, wait_for: str) -> subprocess.Popen[bytes]:
        command = dask("worker", "--scheduler-file", str(contact), "--nthreads", "1", "--no-nanny")
        return start(
            processes,
            [*command, "--preload", str(project.preload)],
            tmp_path / f"machine-{name}",
            project.environment(NAME=f"-{name}", WAIT_FOR=wait_for),
        )

    address = json.loads(contact.read_text())["address"]
    extracting = start(
        processes,
        project.command("shared", "extract-teachers", "--scheduler", address),
        tmp_path / "client",
        project.environment(),
    )
    early = worker("early", wait_for="committed-late")
    project.wait_for("begun-early", extracting, scheduler, early)
    worker("late", wait_for="")
    output, _ = extracting.communicate(timeout=240)
    assert extracting.returncode == 0, (tmp_path / "client" / "errors.txt").read_text()
    (summary,) = json.loads(output)["teachers"]
    assert (summary["images"], summary["shards_written"]) == (IMAGES, SHARDS)
    assert summary["stages"]["seconds"].keys() >= {"read", "forward", "encode", "write"}
    assert {one.name for one in project.marks.iterdir()} >= {"committed-early", "committed-late"}
    assert file_contents(project.store("shared")) == file_contents(project.store("whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_to_all_processes_leaves_a_store_that_resumes(
    project: Project, processes: ExitStack, tmp_path: Path, number: int, code: int
) -> None:
    preload = json.dumps([str(project.preload)])
    extracting = start(
        processes,
        project.command("shared", "extract-teachers", "--workers", "2"),
        tmp_path / "client",
        project.environment(DASK_DISTRIBUTED__WORKER__PRELOAD=preload, WAIT_FOR="signalled"),
    )
    project.wait_for("begun", extracting)
    os.killpg(extracting.pid, number)
    (project.marks / "signalled").touch()
    extracting.communicate(timeout=240)
    errors = (tmp_path / "client" / "errors.txt").read_text()
    assert extracting.returncode == code, errors
    assert "the same command goes on" in errors
    assert project.run("shared", "extract-teachers")["teachers"][0]["shards_written"] > 0
    assert file_contents(project.store("shared")) == file_contents(project.store("whole"))
