"""The command `sak extract-teachers` as a whole: memory, workers, time to the first row.

    python tests/benchmarks/extraction_runs.py memory|workers|start [--json]

`memory` is the peak of the command over 1,000, 10,000 and 100,000 images with a teacher of no
weight; every image is the same small file under another name. `workers` compares one and two worker
processes of one thread each, on as many NYUv2 frames, from the first shard begun to the last
committed, and over the second half of the commits, when all workers have loaded; repeated. `start` is the time from the command to the first row in a shard file, with
the three real teachers of the shared data in one pass.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from extraction import SHARED, teachers
from PIL import Image

REAL = {
    name: config.model_dump(mode="json", exclude_defaults=True)
    for name, config in teachers().items()
}
_LINKS = 50_000  # names of one file: ext4 knows 65,000
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory", "workers", "start"])
    parser.add_argument("--images", type=int, default=192, help="of `workers`")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        results = {
            "memory": lambda: memory(folder),
            "workers": lambda: workers(folder, arguments.images),
            "start": lambda: start(folder),
        }[arguments.what]()
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print("| " + " | ".join(results[0]) + " |")
    print("|" + "---|" * len(results[0]))
    for one in results:
        print("| " + " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value)
                                for value in one.values()) + " |")  # fmt: skip


def memory(folder: Path) -> list[dict[str, Any]]:
    """Return the peak memory of extraction over ever more images."""
    picture = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(picture)
    teacher = {"source": "timm:test_vit", "checkpoint": "random", "levels": 1}
    results = []
    for count in (1_000, 10_000, 100_000):
        images = folder / f"images_{count}"
        images.mkdir()
        for number in range(count):
            if number % _LINKS == 0:
                picture = shutil.copy(picture, folder / f"picture_{count}_{number}.png")
            os.link(picture, images / f"{number:06d}.png")
        project = Project(folder / str(count), images, {"stub": teacher}, [32, 32], 64)
        project.sak("index")
        summary, peak = project.sak("extract-teachers", **ONE_THREAD)
        seconds = summary["teachers"][0]["seconds"]
        results.append({"images": count, "peak MiB": peak // 1024, "seconds": seconds})
    return results


def workers(folder: Path, count: int) -> list[dict[str, Any]]:
    """Return images/s of one and two worker processes of one thread, in turn."""
    images = folder / "images"
    images.mkdir()
    for path in sorted((SHARED / "nyud" / "images").iterdir())[:count]:
        (images / path.name).symlink_to(path)
    results = []
    for number in range(3):
        row: dict[str, Any] = {"round": number}
        for amount in (1, 2):
            project = Project(
                folder / f"{number}-{amount}",
                images,
                {"imagenet": REAL["imagenet"]},
                [448, 576],
                8,
                shard_megabytes=2,  # so many shards that nobody waits long for the last one
            )
            project.sak("index")
            project.sak("extract-teachers", "--workers", str(amount), **ONE_THREAD)
            row[f"{amount} workers, s"] = project.span()
            row[f"{amount} workers, shards/s later"] = project.later_rate()
        row["times faster"] = row["1 workers, s"] / row["2 workers, s"]
        row["times faster later"] = (
            row["2 workers, shards/s later"] / row["1 workers, shards/s later"]
        )
        results.append(row)
    return results


def start(folder: Path) -> list[dict[str, Any]]:
    """Return the seconds from the command to the first row."""
    results = []
    for number in range(4):
        project = Project(folder / str(number), SHARED / "nyud" / "images", REAL, [448, 576], 8)
        project.sak("index")
        started = time.perf_counter()
        process = subprocess.Popen(project.command("extract-teachers", "--together"),
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        project.wait_for(lambda path: path.stat().st_size > 0)
        results.append({"round": number, "seconds to first row": time.perf_counter() - started})
        process.kill()
        process.wait()
    return results[1:]  # the first one warms the disk


class Project:
    """A parameter file with its store."""

    def __init__(
        self,
        folder: Path,
        images: Path,
        teachers: dict[str, Any],
        size: list[int],
        batch_size: int,
        shard_megabytes: int = 16,
    ) -> None:
        folder.mkdir()
        self.store = folder / "features.zarr"
        self._params = folder / "params.yaml"
        params = yaml.safe_load(Path("params.yaml").read_text())
        params |= {
            "store": str(self.store),
            "data": {"kind": "folder", "root": str(images)},
            "tasks": [],
            "image_size": size,
            "teachers": teachers,
            "extract": {
                "batch_size": batch_size, "shard_megabytes": shard_megabytes,
                "equivariance_images": 0, "device": "cpu",
            },
        }  # fmt: skip
        self._params.write_text(yaml.safe_dump(params))

    def command(self, step: str, *options: str) -> list[str]:
        """Return the words of a command."""
        return [str(Path(sys.executable).with_name("sak")), step, *options, "--json", "--params",
                str(self._params)]  # fmt: skip

    def sak(self, step: str, *options: str, **environment: str) -> tuple[Any, int]:
        """Run a command; return what it says and its peak memory in KiB."""
        process = subprocess.Popen(
            self.command(step, *options), stdout=subprocess.PIPE, env={**os.environ, **environment}
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(process.returncode)
        return json.loads(output), used.ru_maxrss

    def span(self) -> float:
        """Return the seconds from the first shard's first row to the last commit."""
        features = list(self.store.glob("*/*/*/c.*"))
        begun = min(path.stat().st_ctime for path in self.store.glob("*/commit/zarr.json"))
        marks = [path.stat().st_mtime for path in self.store.glob("*/valid/c.*")]
        assert features
        return max(marks) - begun

    def later_rate(self) -> float:
        """Return the shards per second of the second half of the commits.

        By then all workers have loaded their teacher.
        """
        marks = sorted(path.stat().st_mtime for path in self.store.glob("*/valid/c.*"))
        half = len(marks) // 2
        return (len(marks) - 1 - half) / (marks[-1] - marks[half])

    def wait_for(self, found: Callable[[Path], bool]) -> None:
        """Return when a file of some level's shard is as asked."""
        while not any(found(path) for path in self.store.glob("*/*/*/.*.partial")):
            time.sleep(0.01)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
