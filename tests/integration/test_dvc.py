"""`dvc repro` runs what changed and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from store.reader import FeatureStore

ROOT = Path(__file__).parents[2]
TRAINING = {"distill", "multitask", "baseline", "single-task@depth", "evaluate"}


@pytest.fixture
def project(tmp_path: Path, tiny_params: Path) -> Path:
    values = yaml.safe_load(tiny_params.read_text().replace(f"{tmp_path}/", ""))
    del values["teachers"]["second"]
    write(tmp_path, {**values, "tasks": ["depth"]})
    ignore = shutil.ignore_patterns("__pycache__", "weights", "pretrain")
    for package in ("stages", "store"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    run(tmp_path, "init", "--no-scm", "--quiet")
    shutil.copy(ROOT / ".dvc" / "config", tmp_path / ".dvc" / "config")
    with (tmp_path / ".dvc" / "config").open("a") as file:
        file.write("    no_scm = true\n")
    return tmp_path


def write(project: Path, params: dict[str, Any]) -> None:
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def run(project: Path, *arguments: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["dvc", *arguments],
        check=False,
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def repro(project: Path, *arguments: str) -> set[str]:
    """Run `dvc repro` and return the names of the stages that ran."""
    output = run(project, "repro", *arguments)
    lines = [line for line in output.splitlines() if line.startswith("Running stage ")]
    return {line.split("'")[1] for line in lines}


def test_only_what_changed_runs_again(project: Path) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    assert repro(project) == {"index", "extract@first"} | TRAINING
    assert repro(project) == set()

    params["multitask"]["learning_rate"] = 0.002
    write(project, params)
    assert repro(project) == TRAINING - {"distill"}

    params["teachers"]["second"] = params["teachers"]["first"]
    write(project, params)
    first = (project / "features.zarr" / "first" / "valid" / "c.0").stat().st_mtime_ns
    ran = repro(project)
    assert "index" not in ran
    assert {"extract@second", "distill", "multitask", "baseline", "evaluate"} <= ran
    assert "extract@first" not in ran
    assert (project / "features.zarr" / "first" / "valid" / "c.0").stat().st_mtime_ns == first
    assert repro(project) == set()
    metrics = run(project, "metrics", "show", "--md")
    assert "delta_m" in metrics


def paint(project: Path, *names: str) -> None:
    for name in names:
        colour = (int(name[1:]), 9, 99)
        Image.new("RGB", (60, 40), colour).save(project / "photos" / f"{name}.png")


def test_only_the_images_that_were_added_are_extracted(project: Path) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params |= {"image_size": [256, 384], "tasks": [], "data": {"kind": "folder", "root": "photos"}}
    params["extract"] = {"batch_size": 4, "shard_megabytes": 1}  # 17 rows of 32 x 48 x 24 values
    write(project, params)
    (project / "photos").mkdir()
    paint(project, *(f"b{number}" for number in range(20)))
    assert repro(project, "extract@first") == {"index", "extract@first"}
    native = project / "features.zarr" / "first" / "block_03" / "native"
    whole, short = native / "c.0.0.0.0", native / "c.1.0.0.0"
    before = whole.stat()
    short_bytes = short.stat().st_size

    paint(project, "a20", "a21")
    repro(project, "--force", "--single-item", "index")
    assert repro(project, "extract@first") == {"extract@first"}
    after = whole.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert short.stat().st_size > short_bytes
    store = FeatureStore(project / "features.zarr")
    assert store.images.ids[-2:] == ("a20", "a21")
    assert store.read("first", "block_03", range(22)).shape == (22, 32, 48, 24)
    assert repro(project, "extract@first") == set()
