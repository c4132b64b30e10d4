"""Speed of extraction: against the teachers' own, against plain scripts, in one pass, by workers.

    python tests/benchmarks/extraction.py forward|together|writers|files [--images 48] [--rounds 3]

`forward` compares images/s of `extract` with those of the three real teachers of the shared data on
inputs that are in memory already, each alone and all in one pass, at 448 x 576. The processor
seconds of both say what ratio is possible at all where everything shares the cores. `together`
compares one pass over all teachers with one pass each, on the NYUv2 frames and on the same frames
as photographs of 12 megapixels. `writers` compares with what people write themselves: a DataLoader,
a forward pass and one .npy file per image and level; and with tar shards of such files, as
Theia's feature cache has. `files` tells how many each way makes of more images. With `--give-back` memory is as Python starts, without what the command
`sak` does about it. All of a round runs in one process, in turn.
"""

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stages.data.config import ViewsConfig
from stages.data.images import index_images
from stages.data.sources import ImageSource, list_folder
from stages.data.views import draw_views
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.devices import streams_of
from stages.extract.flow import threads_per_stream
from stages.extract.reading import RowReader, open_rows
from stages.extract.run import open_extraction, run_together
from stages.extract.teachers import NetworkTeacher, load_teacher
from stages.memory import KEPT
from stages.progress import NoProgress
from stages.stopping import Stop
from store.create import create_store
from store.sizes import future_record, row_bytes, tables_size, teacher_size
from store.writer import DEFAULT_SHARD_BYTES

SHARED = Path(__file__).parents[3] / "shared" / "data"
SIZE = (448, 576)
BATCH = 8
CPU = torch.device("cpu")
SETTINGS = ExtractConfig(batch_size=BATCH, device="cpu", equivariance_images=0)


def teachers() -> dict[str, TeacherConfig]:
    """Return the three real teachers."""
    named = {
        "imagenet": ("imagenet_tf_qat", {}),
        "deeplab": ("deeplab_voc_backbone", {"output_stride": 16}),
        "birds": ("inat_bird", {}),
    }
    return {
        name: TeacherConfig(
            source="timm:mobilenetv2_100",
            checkpoint=SHARED / "weights" / f"mobilenetv2_100.{file}.safetensors",
            model_args={"pad_type": "same", **arguments},
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )
        for name, (file, arguments) in named.items()
    }


GROUPS = [*([name] for name in teachers()), list(teachers())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["forward", "together", "writers", "files"])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--teachers", nargs="+", choices=list(teachers()), help="of `forward`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--give-back", action="store_true", help="freed memory to the system")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.give_back and not KEPT.items() <= os.environ.items():
        # As `sak` does before it imports torch; the others in this process profit as well.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT})
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        bench = Bench(Path(name), arguments.images, arguments.rounds)
        chosen = [arguments.teachers] if arguments.teachers else GROUPS
        results = (
            bench.forward(chosen)
            if arguments.what == "forward"
            else getattr(bench, arguments.what)()
        )
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print("| " + " | ".join(results[0]) + " |")
    print("|" + "---|" * len(results[0]))
    for one in results:
        print("| " + " | ".join(_shown(value) for value in one.values()) + " |")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Bench:
    """What is measured, on the first images of NYUv2."""

    def __init__(self, folder: Path, images: int, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.sources = list_folder(SHARED / "nyud" / "images")[:images]
        self.stores = 0

    def forward(self, groups: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """Return end-to-end over pure forward, for each group of teachers in one pass."""
        every = teachers()
        return [self._forward({name: every[name] for name in group}) for group in groups]

    def _forward(self, configs: dict[str, TeacherConfig]) -> dict[str, Any]:
        loaded = [load_teacher(name, config, SIZE, CPU) for name, config in configs.items()]
        inputs = [self._inputs(teacher) for teacher in loaded]

        batches = [
            (teacher, batch)
            for parts in zip(*(images.split(BATCH) for images in inputs), strict=True)
            for teacher, batch in zip(loaded, parts, strict=True)
        ]
        streams = streams_of(loaded)

        def forward(teacher: NetworkTeacher, batch: Tensor) -> None:
            teacher(batch)

        def pure() -> None:
            with threads_per_stream(streams), ThreadPoolExecutor(streams) as pool:
                for _ in pool.map(forward, *zip(*batches, strict=True)):
                    pass

        def one_stream() -> None:
            for teacher, batch in batches:
                teacher(batch)

        spent: list[dict[str, float]] = []

        def ours() -> None:
            spent.append(self._extract(configs, self.sources))

        runs = self._rounds({"pure": pure, "one stream": one_stream, "ours": ours})
        count = len(self.sources)
        ours_seconds = [one["elapsed"] for one in spent[1:]]  # without loading
        ratios = [p / o for (p, _), o in zip(runs["pure"], ours_seconds, strict=True)]
        bounds = [
            pure_cpu / one["cpu"]
            for (_, pure_cpu), one in zip(runs["pure"], spent[1:], strict=True)
        ]
        return {
            "teachers": ", ".join(configs),
            "pure images/s": count / statistics.median(seconds for seconds, _ in runs["pure"]),
            "in one stream": count / statistics.median(s for s, _ in runs["one stream"]),
            "ours images/s": count / statistics.median(ours_seconds),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "ratio of CPU seconds": statistics.median(bounds),
            **{
                f"{stage} CPU ms/image": 1000
                * statistics.median(one[stage] for one in spent)
                / count
                for stage in ("decode", "preprocess", "stack", "encode", "write")
            },
        }

    def together(self) -> list[dict[str, Any]]:
        """Return three passes over one, on frames and on photographs."""
        small = {
            name: config.model_copy(update={"input_size": (224, 288)})
            for name, config in teachers().items()
        }
        cases = [
            ("640 x 480, teachers at 448 x 576", self.sources, teachers()),
            ("640 x 480, teachers at 224 x 288", self.sources, small),
            ("4000 x 3000, teachers at 224 x 288", self._photographs(), small),
        ]
        return [self._together(*case) for case in cases]

    def _together(
        self, name: str, sources: Sequence[ImageSource], configs: dict[str, TeacherConfig]
    ) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {"separate": [], "one pass": []}
        for _ in range(self.rounds):
            separate = [
                self._extract({key: config}, sources)["elapsed"] for key, config in configs.items()
            ]
            seconds["separate"].append(sum(separate))
            seconds["one pass"].append(self._extract(configs, sources)["elapsed"])
        ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
        return {
            "images": name,
            **{f"{key}, s": statistics.median(values) for key, values in seconds.items()},
            "times faster": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }

    def writers(self) -> list[dict[str, Any]]:
        """Return seconds and files of extraction and of two usual ways, all three teachers."""
        configs = teachers()
        runs = self._rounds(
            {
                "sak, one pass": lambda: self._extract(configs, self.sources),
                "DataLoader, .npy per image": lambda: self._plainly(configs, self._npy_files),
                "DataLoader, tar shards": lambda: self._plainly(configs, self._tar_shards),
            }
        )
        first = statistics.median(seconds for seconds, _ in runs["sak, one pass"])
        return [
            {
                "way": way,
                "images/s": len(self.sources) / statistics.median(s for s, _ in spent),
                "times our time": statistics.median(s for s, _ in spent) / first,
                "lowest": min(s for s, _ in spent) / first,
                "highest": max(s for s, _ in spent) / first,
                "files": self.counted[way],
            }
            for way, spent in runs.items()
        ]

    def files(self) -> list[dict[str, Any]]:
        """Return the files of each way for more images than are run, by arithmetic."""
        specs = [load_teacher(*one, SIZE, CPU).spec for one in teachers().items()]
        images = index_images(self.sources, max_bad=0.1, progress=NoProgress())
        results = []
        for count in (1_000, 10_000, 100_000):
            records = [future_record(spec, {}, count, DEFAULT_SHARD_BYTES) for spec in specs]
            sizes = [tables_size(images, count, SIZE), *map(teacher_size, records)]
            total = sum(sizes[1:], sizes[0])
            gigabytes = total.bytes / 1e9
            large = sum(-(-count * row_bytes(one) // DEFAULT_SHARD_BYTES) for one in records)
            results.append({
                "images": count,
                "GB": gigabytes,
                "sak": total.files,
                ".npy per image and level": count * sum(len(spec.levels) for spec in specs),
                "tars of 1,000 samples": len(specs) * -(-count // 1_000),
                "tars of 128 MiB": large,
            })  # fmt: skip
        return results

    def _rounds(self, ways: dict[str, Callable[[], Any]]) -> dict[str, list[tuple[float, float]]]:
        """Return seconds and processor seconds of each way and round, after one to warm up."""
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        self.counted: dict[str, int] = {}
        for number in range(self.rounds + 1):
            for name, way in ways.items():
                started, cpu = time.perf_counter(), cpu_seconds()
                way()
                spent = time.perf_counter() - started, cpu_seconds() - cpu
                if number:
                    found[name].append(spent)
                self.counted[name] = sum(path.is_file() for path in self.folder.rglob("*"))
                shutil.rmtree(self.folder / "out", ignore_errors=True)
        return found

    def _extract(
        self, configs: dict[str, TeacherConfig], sources: Sequence[ImageSource]
    ) -> dict[str, float]:
        """Extract into a new store; return seconds, CPU seconds of pass and stages, all summed."""
        self.stores += 1
        path = self.folder / "out" / f"{self.stores}.zarr"
        images = index_images(sources, max_bad=0.1, progress=NoProgress())
        create_store(path, images, draw_views(images, SIZE, ViewsConfig()))
        extractions = [
            open_extraction(path, sources, SIZE, load_teacher(name, config, SIZE, CPU), SETTINGS)
            for name, config in configs.items()
        ]
        before = cpu_seconds()
        times = run_together(extractions, NoProgress(), Stop())[0].stages
        assert times is not None
        return {**times.cpu_seconds, "elapsed": times.elapsed, "cpu": cpu_seconds() - before}

    def _inputs(self, teacher: NetworkTeacher) -> Tensor:
        return torch.stack([self._rows(teacher).load(row) for row in range(len(self.sources))])

    def _rows(self, teacher: NetworkTeacher) -> RowReader:
        path = self.folder / "index.zarr"
        images = index_images(self.sources, max_bad=0.1, progress=NoProgress())
        create_store(path, images, draw_views(images, SIZE, ViewsConfig()))
        return open_rows(path, self.sources, SIZE, teacher)

    def _photographs(self) -> Sequence[ImageSource]:
        folder = self.folder / "photographs"
        folder.mkdir()
        for source in self.sources:
            assert isinstance(source.path, Path)
            with Image.open(source.path) as image:
                image.resize((4000, 3000)).save(folder / f"{source.id}.jpg", quality=90)
        return list_folder(folder)

    def _plainly(
        self,
        configs: dict[str, TeacherConfig],
        write: Callable[[str, Iterator[tuple[str, dict[str, np.ndarray]]]], None],
    ) -> None:
        """Run teacher after teacher over a DataLoader with a worker, as a script would."""
        for name, config in configs.items():
            teacher = load_teacher(name, config, SIZE, CPU)
            write(name, self._answers(teacher))

    def _answers(self, teacher: NetworkTeacher) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        loader = DataLoader(Frames(self._rows(teacher)), batch_size=BATCH, num_workers=1)
        names = iter(source.id for source in self.sources)
        for batch in loader:
            levels = {
                level: values.half().numpy() for level, values in teacher(batch).levels.items()
            }
            for row in range(len(batch)):
                yield next(names), {level: values[row] for level, values in levels.items()}

    def _npy_files(self, name: str, answers: Iterator[tuple[str, dict[str, np.ndarray]]]) -> None:
        folder = self.folder / "out" / name
        folder.mkdir(parents=True)
        for image, levels in answers:
            for level, values in levels.items():
                np.save(folder / f"{image}.{level}.npy", values)

    def _tar_shards(self, name: str, answers: Iterator[tuple[str, dict[str, np.ndarray]]]) -> None:
        folder = self.folder / "out" / name
        folder.mkdir(parents=True)
        with tarfile.open(folder / "00000.tar", "w") as tar:
            for image, levels in answers:
                for level, values in levels.items():
                    data = io.BytesIO()
                    np.save(data, values)
                    entry = tarfile.TarInfo(f"{image}.{level}.npy")
                    entry.size = data.tell()
                    data.seek(0)
                    tar.addfile(entry, data)


class Frames(Dataset[Tensor]):
    """The inputs of a teacher, read by a DataLoader's worker."""

    def __init__(self, rows: RowReader) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.views)

    def __getitem__(self, row: int) -> Tensor:
        return self._rows.load(row)


def cpu_seconds() -> float:
    """Return the processor seconds of this process and its dead children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
