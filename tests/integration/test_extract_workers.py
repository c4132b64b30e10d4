"""`extract-teachers` by dask workers that are killed, join late, or belong to another scheduler."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from store.testing import file_contents

RUN = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import store.teacher_layout
from distributed import WorkerPlugin
from pipeline.params import load_params
from pipeline.extraction import extract_teachers
from stages.extract import cluster
from stages.extract.units import Job
from stages.progress import NoProgress

# Workers take their code from here, by value: shards of two rows, and a ticket that says when the
# worker that draws it kills itself. One that is started in its place draws the next ticket.
class Tickets(WorkerPlugin):
    def __init__(self, folder):
        self.folder = folder

    def setup(self, worker):
        import store.teacher_layout
        from store.testing import kill_at_call
        store.teacher_layout.MAX_ROWS_PER_SHARD = 2
        for ticket in sorted(os.listdir(self.folder)):
            try:
                os.unlink(os.path.join(self.folder, ticket))
            except FileNotFoundError:
                continue  # another worker was faster
            kill_at_call(int(ticket.partition("-")[2]), ("writev", "fsync", "replace", "unlink"))
            break

def job(params):
    (name,) = params.teachers
    return Job(store=params.store, data=params.data, image_size=params.image_size, name=name,
               teacher=params.teachers[name], settings=params.extract)

def main(whole, shared, tickets):
    store.teacher_layout.MAX_ROWS_PER_SHARD = 2
    extract_teachers(load_params(Path(whole)), [], False, NoProgress())
    with cluster.local_workers(2, "cpu") as client:
        client.register_plugin(Tickets(tickets))
        summary = cluster.extract_on(client, job(load_params(Path(shared))), NoProgress())
        again = cluster.extract_on(client, job(load_params(Path(shared))), NoProgress())
    print(json.dumps([[one.images, one.quarantined, one.already_there, one.shards_written]
                      for one in (summary, again)]))
    assert again.stages is None
    assert summary.stages.bottleneck in {"read", "decode", "preprocess", "forward", "encode", "write"}

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def projects(tiny_params: Path, images: int) -> tuple[Path, Path]:
    """Parameter files of two stores of the same pictures, indexed."""
    folder = tiny_params.parent
    params: dict[str, Any] = yaml.safe_load(tiny_params.read_text())
    del params["teachers"]["second"]
    (folder / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for number in range(images):
        pixels = generator.integers(0, 256, (40 + number, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:03}.png")
    (folder / "pictures" / "bad.png").write_bytes(b"no image")
    data = {"kind": "folder", "root": str(folder / "pictures"), "max_bad": 0.5}
    params |= {"data": data, "tasks": []}
    paths = []
    for name in ("whole", "shared"):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**params, "store": str(folder / f"{name}.zarr")}))
        result = CliRunner().invoke(app, ["index", "--params", str(path)])
        assert result.exit_code == 0, result.output
        paths.append(path)
    return paths[0], paths[1]


@pytest.mark.parametrize(
    ("kills", "images"), [(2, 11), pytest.param(20, 59, marks=pytest.mark.slow)]
)
def test_workers_killed_at_random_moments_are_replaced(
    tiny_params: Path, tmp_path: Path, kills: int, images: int
) -> None:
    whole, shared = projects(tiny_params, images)
    tickets = tmp_path / "tickets"
    tickets.mkdir()
    moments = np.random.default_rng(2).choice(np.arange(1, 80), kills, replace=False)
    for number, moment in enumerate(moments.tolist()):
        (tickets / f"{number:02}-{moment}").touch()
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, str(script), str(whole), str(shared), str(tickets)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    summary, again = json.loads(done.stdout.splitlines()[-1])
    assert list(tickets.iterdir()) == []
    assert again == [0, 0, images + 1, 0]
    assert summary[2] + summary[0] + summary[1] == images + 1
    # What a worker committed before it died is in no summary, but never written twice.
    assert (images + 1) // 2 - kills <= summary[3] <= (images + 1) // 2
    assert file_contents(tmp_path / "shared.zarr") == file_contents(tmp_path / "whole.zarr")
