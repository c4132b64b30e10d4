"""Trains the same student from the same targets under several codecs and seeds, and compares.

    python tests/benchmarks/student_from_codecs.py FOLDER --params params.yaml

The parameter file names the data, the teachers (codec float32) and the phases. Teachers run once;
the other codecs' stores are written from the float32 one, so that nothing else differs. Every run
is kept in FOLDER and is not repeated. Prints a table and writes FOLDER/student.json.
"""

import argparse
import json
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from store.calibration import Calibration
from store.create import create_store
from store.reader import FeatureStore
from store.spec import TeacherSpec
from store.writer import FeatureWriter

BATCH = 32
CALIBRATION_ROWS = 320


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--codecs", nargs="+", default=["float32", "int8", "pca-4bit", "pca-2bit"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    base = yaml.safe_load(arguments.params.read_text())
    exact = write_params(arguments.folder, base, "float32", 0)
    sak("index", exact)
    sak("extract-teachers", exact)
    for task in base["tasks"]:
        sak("train-student", exact, "single-task", "--task", task)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.codecs}
    for seed in range(arguments.seeds):
        for codec in arguments.codecs:
            params = write_params(arguments.folder, base, codec, seed)
            recode(arguments.folder, codec)
            share_single_tasks(arguments.folder, base["tasks"], codec, seed)
            sak("train-student", params, "distill")
            sak("train-student", params, "multitask")
            figures[codec].append(evaluate(params))
            print(codec, seed, figures[codec][-1], flush=True)
    (arguments.folder / "student.json").write_text(json.dumps(figures, indent=2))
    print(table(figures))


def write_params(folder: Path, base: dict[str, Any], codec: str, seed: int) -> Path:
    """Write the parameter file of one codec and seed, and return its path."""
    runs = folder / f"{codec}-{seed}"
    teachers = {name: {**entry, "codec": codec} for name, entry in base["teachers"].items()}
    params = {
        **base,
        "teachers": teachers,
        "store": str(folder / f"{codec}.zarr"),
        "runs": str(runs),
        "report": str(runs / "report"),
        "runtime": {**base["runtime"], "seed": seed},
    }
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return path


def recode(folder: Path, codec: str) -> None:
    """Write the float32 store's features once more under another codec."""
    if codec == "float32":
        return
    source = FeatureStore(folder / "float32.zarr")
    path = folder / f"{codec}.zarr"
    create_store(path, source.images, source.views)
    for spec in source.teachers.values():
        # At the stored grids, which become the native ones: the same targets.
        levels = tuple(replace(level, grid=level.stored[0], stored=()) for level in spec.levels)
        config = {**spec.provenance["config"], "codec": codec}
        provenance = {**spec.provenance, "config": config}
        new = replace(spec, levels=levels, codec=codec, provenance=provenance)

        def calibrate(source: FeatureStore = source, new: TeacherSpec = new) -> dict[str, Any]:
            return calibrated(source, new)

        with FeatureWriter.open(path, new, calibrate=calibrate) as writer:
            for shard in writer.missing():
                for start in range(shard.start, shard.stop, BATCH):
                    rows = range(start, min(start + BATCH, shard.stop))
                    values = {
                        level.name: source.read(new.name, level.name, rows) for level in levels
                    }
                    pooled = None
                    if new.global_channels is not None:
                        pooled = source.read(new.name, "global", rows)
                    writer.write(rows, values, pooled, np.ones(len(rows), bool))
            writer.finish()


def calibrated(source: FeatureStore, spec: TeacherSpec) -> dict[str, Any]:
    """Fit the codecs to rows spread over the store, every fifth of them to measure on."""
    rows = np.random.default_rng(0).permutation(source.rows)[:CALIBRATION_ROWS]
    calibration = Calibration(spec, len(rows))
    for position, row in enumerate(rows.tolist()):
        levels = {level.name: source.read(spec.name, level.name, [row])[0] for level in spec.levels}
        calibration.add(levels, held_out=position % 5 == 1)
    return calibration.fit(spec.codec)


def share_single_tasks(folder: Path, tasks: list[str], codec: str, seed: int) -> None:
    """Let every run be compared with the same single-task students."""
    for task in tasks:
        link = folder / f"{codec}-{seed}" / f"single-{task}"
        if not link.exists():
            link.symlink_to((folder / "float32-0" / f"single-{task}").absolute())


def sak(command: str, params: Path, *arguments: str) -> None:
    """Run a command; what is finished already returns at once."""
    subprocess.run(["sak", command, *arguments, "--params", str(params)], check=True)


def evaluate(params: Path) -> dict[str, float]:
    """Return delta_m and the task figures of the multitask run."""
    sak("evaluate", params)
    report = Path(yaml.safe_load(params.read_text())["report"])
    metrics = json.loads((report / "metrics.json").read_text())
    run = metrics["runs"]["SAK student"]
    return {"delta_m": run["delta_m"], **run["metrics"]}


def table(figures: dict[str, list[dict[str, float]]]) -> str:
    """Return a Markdown table: mean and range over the seeds of every figure."""
    names = list(next(iter(figures.values()))[0])
    lines = ["| codec | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for codec, runs in figures.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            mean = statistics.fmean(values)
            cells.append(f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {codec} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
