"""`sak extract-teachers` killed, terminated and run twice at once: the store is the same at last.

One process imports torch and forks a child per run, which then types the command.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from store.reader import FeatureStore
from store.testing import file_contents

RUNS = """
import json, multiprocessing, os, signal, sys, time
import torch
torch.set_num_threads(1)  # a pool of threads would not survive the fork
import stages.extract.run
import store.teacher_layout
from pipeline.cli import app
from store.shard import ShardWriter
from store.testing import kill_at_call

store.teacher_layout.MAX_ROWS_PER_SHARD = 2
append = ShardWriter.append
meeting = multiprocessing.get_context("fork").Barrier(2)

def interfere(run):
    os.dup2(os.open(run["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    if run.get("kill"):
        kill_at_call(run["kill"], ("writev", "fsync", "replace", "unlink"))
    rows = 0
    def counted(self, row):
        nonlocal rows
        rows += 1
        if rows == 1 and run.get("meet"):
            meeting.wait(60)
        if rows in run.get("terminate", ()):
            os.kill(os.getpid(), signal.SIGTERM)
            while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
                time.sleep(0.01)  # else the next one may come before this one is seen, as one
        append(self, row)
    ShardWriter.append = counted

for runs in json.loads(sys.argv[1]):  # those of one list at the same time
    children = []
    for run in runs:
        child = os.fork()
        if child == 0:
            interfere(run)
            try:
                app(run["arguments"])
            except SystemExit as done:
                sys.stdout.flush()
                os._exit(done.code or 0)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children]))
"""
IMAGES = 25
SHARDS = 13
ARRAYS = 5  # four levels and the pooled output: so many appends a row


def run(*together: list[dict[str, Any]]) -> list[list[int]]:
    """Return the exit codes of commands; those of one list run at the same time."""
    command = [sys.executable, "-c", RUNS, json.dumps(together)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
    return [json.loads(line) for line in done.stdout.splitlines()]


class Project:
    """One parameter file per store, all on the same images."""

    def __init__(self, folder: Path, params: dict[str, Any]) -> None:
        self.folder, self._params = folder, params

    def command(self, name: str, step: str, *options: str, **extra: Any) -> dict[str, Any]:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**self._params, "store": str(self.store(name))}))
        output = str(self.folder / f"{name}-{step}{extra.pop('number', '')}.txt")
        return {"arguments": [step, *options, "--params", str(path)], "output": output, **extra}

    def extract(self, name: str, *options: str, **extra: Any) -> dict[str, Any]:
        return self.command(name, "extract-teachers", *options, **extra)

    def store(self, name: str) -> Path:
        return self.folder / name / "features.zarr"

    def output(self, name: str, number: object = "") -> str:
        return (self.folder / f"{name}-extract-teachers{number}.txt").read_text()

    def copies(self, *names: str) -> None:
        for name in names:
            shutil.copytree(self.folder / "indexed", self.folder / name)


@pytest.fixture
def project(tiny_params: Path, tmp_path: Path) -> Project:
    """Pictures, one random teacher, shards of two rows; `whole` is extracted without a fault."""
    params = yaml.safe_load(tiny_params.read_text())
    del params["teachers"]["second"]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (40 + number, 60, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    params |= {"data": {"kind": "folder", "root": str(pictures)}, "tasks": []}
    params["extract"]["batch_size"] = 1  # images are read ahead, and so shards claimed, by batches
    made = Project(tmp_path, params)
    assert run([made.command("indexed", "index")]) == [[0]]
    made.copies("whole")
    return made


def committed(store: Path) -> int:
    return len(list(store.glob("first/valid/c.*")))


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_equals_an_uninterrupted_run(
    project: Project, kills: int
) -> None:
    names = [str(number) for number in range(kills)]
    project.copies(*names)
    moments = np.random.default_rng(1).choice(np.arange(1, 600), kills, replace=False).tolist()
    killed = [
        project.extract(name, kill=moment) for name, moment in zip(names, moments, strict=True)
    ]
    first, *codes = run([project.extract("whole")], *([one] for one in killed))
    assert first == [0]
    assert codes == [[-9]] * kills
    left = [committed(project.store(name)) for name in names]
    assert min(left) < max(left)
    assert not any("first" in FeatureStore(project.store(name)).teachers for name in names)
    again = run(*([project.extract(name)] for name in names))
    assert again == [[0]] * kills
    whole = file_contents(project.store("whole"))
    for name, moment in zip(names, moments, strict=True):
        assert file_contents(project.store(name)) == whole, f"killed at call {moment}"


def test_sigterm_finishes_the_shard_and_the_same_command_resumes(project: Project) -> None:
    project.copies("once", "twice")
    codes = run(
        [project.extract("whole")],
        [project.extract("once", terminate=[2 * ARRAYS + 3])],  # in the second shard
        [project.extract("twice", terminate=[2 * ARRAYS + 3, 3 * ARRAYS + 2])],
    )
    assert codes == [[0], [143], [-15]]
    assert committed(project.store("once")) == 2
    assert committed(project.store("twice")) == 1
    assert "terminated; the same command goes on from the last shard" in project.output("once")
    assert "Traceback" not in project.output("once")
    assert not list(project.store("once").rglob(".*.partial"))
    assert run([project.extract("once")], [project.extract("twice")]) == [[0], [0]]
    whole = file_contents(project.store("whole"))
    assert file_contents(project.store("once")) == file_contents(project.store("twice")) == whole


def test_damaged_lock_files_and_clocks_that_were_changed_hold_nobody_back(project: Project) -> None:
    """A lock is the kernel's: neither what is in its file nor how old that is means anything."""
    project.copies("damaged")
    stopped = project.extract("damaged", terminate=[2 * ARRAYS + 3])
    assert run([project.extract("whole")], [stopped]) == [[0], [143]]
    commit = project.store("damaged") / "first" / "commit"
    for name in (".lock-teacher", ".lock-3", ".lock-7"):
        (commit / name).write_bytes(b"\x00\xff no lock")
    future = 2**31
    for number, path in enumerate(sorted(project.store("damaged").rglob("*"))):
        os.utime(path, (future, future) if number % 2 else (0, 0))
    assert run([project.extract("damaged")]) == [[0]]
    assert file_contents(project.store("damaged")) == file_contents(project.store("whole"))


def test_two_commands_at_once_fill_one_store(project: Project) -> None:
    project.copies("both")
    codes = run(
        [project.extract("whole")],
        [
            project.extract("both", "--json", number=number, meet=True)  # each holds a shard then
            for number in range(2)
        ],
    )
    assert codes == [[0], [0, 0]]
    done = [json.loads(project.output("both", number))["teachers"][0] for number in range(2)]
    assert all(one["shards_written"] > 0 for one in done)
    assert sum(one["shards_written"] for one in done) == SHARDS
    assert sum(one["images"] for one in done) == IMAGES
    assert file_contents(project.store("both")) == file_contents(project.store("whole"))
