"""What cached targets cost a training step, and how time and memory grow with the store.

    python tests/benchmarks/training_step.py step [--device cuda] [--batch 2] [--steps 4]
    python tests/benchmarks/training_step.py growth [--images 1000 10000 100000]

`step`: a ViT-S at 384 x 384 learns from three teachers of four levels (24 x 24 x 768). Each round
takes the same steps twice, first with a batch that lies decoded in the memory of the device, then
with batches of the stream: images, codes from the store, copied and decoded on the device. The
ratio is that of one round; the median and the range over rounds are told, for the time on the
clock and for that of the processor (all threads; the steadier one where others use the machine),
with the share of the time that the loop waited for batches.

`growth`: an epoch of a tiny student with a store whose rows are made up (everything else is real:
order, draws, image files, batches, steps), and the peak memory of that process, per number of
images. Microseconds per image must not grow.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from stages.data.config import FolderData
from stages.data.dataset import Dataset, open_dataset
from stages.data.sources import ImageSource
from stages.memory import keep_freed_memory
from stages.train.config import StudentConfig
from stages.train.device import pick_device
from stages.train.losses import distillation_losses
from stages.train.sampling import Draw
from stages.train.stream import Batch, StreamSpec, TargetStream, batches
from stages.train.student import Student, build_student
from stages.train.targets import CachedTargets, TargetSource, TeacherTargets
from stages.train.transfer import on_device
from store.create import create_store
from store.images import ImageTable
from store.reader import FeatureStore
from store.spec import LevelSpec, TeacherSpec
from store.testing import sample_images, sample_views
from store.writer import FeatureWriter

NAMES = ("dinov2", "clip", "sam")
SIDE, GRID, CHANNELS = 384, (24, 24), 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["step", "growth", "epoch"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--codec", default="float16", choices=["float16", "float32"])
    parser.add_argument("--rows", type=int, default=32, help="images in the store of `step`")
    parser.add_argument("--folder", type=Path, help="where the store of `step` is made")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000])
    arguments = parser.parse_args()
    keep_freed_memory()  # as `sak` does
    {"step": measure_step, "growth": measure_growth, "epoch": measure_epoch}[arguments.what](
        arguments
    )


def measure_step(arguments: argparse.Namespace) -> None:
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    student = build_student(
        StudentConfig(model="vit_small_patch16_384", levels=4),
        (SIDE, SIDE),
        dict.fromkeys(NAMES, (CHANNELS,) * 4),
        (),
    ).to(device)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        dataset, store = make_store(Path(folder), arguments)
        stream = TargetStream(spec_of(student, store, 64 << 20), dataset, store)
        source = CachedTargets(store, stream.levels, device)
        taken = arguments.rounds * arguments.steps + 2
        cached = on_device(
            batches(
                stream,
                batch_size=arguments.batch,
                start=0,
                stop=taken,
                workers=arguments.workers,
                pin=device.type == "cuda",
            ),
            device,
        )
        step = Step(student, source)
        ready = next(cached)
        in_memory = Step(student, Ready(source(ready)), step.optimizer)
        in_memory.take(ready, device)
        step.take(next(cached), device)
        ratios, work, waits, seconds = [], [], [], []
        for _ in range(arguments.rounds):
            plain, plain_work, _ = timed(
                in_memory, iter([ready] * arguments.steps), arguments.steps, device
            )
            ours, our_work, waited = timed(step, cached, arguments.steps, device)
            ratios.append(ours / plain)
            work.append(our_work / plain_work)
            waits.append(waited / ours)
            seconds.append(ours / arguments.steps)
    megabytes = sum(one.nbytes for levels in ready.targets.values() for one in levels) / 1e6
    print(
        "| device | batch | targets of a step | step | cached over in memory (range) "
        "| processor time (range) | waiting |"
    )
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {device} | {arguments.batch} | {megabytes:.1f} MB | {statistics.median(seconds):.3f} s "
        f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
        f"| {statistics.median(work):.3f} ({min(work):.3f} to {max(work):.3f}) "
        f"| {100 * statistics.median(waits):.2f} % |"
    )


class Ready:
    """Targets that lie decoded on the device."""

    def __init__(self, targets: dict[str, TeacherTargets]) -> None:
        self._targets = targets

    def __call__(self, batch: Batch) -> dict[str, TeacherTargets]:
        return self._targets


class Step:
    """A step of the distillation phase."""

    def __init__(
        self,
        student: Student,
        source: TargetSource,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._student, self._source = student.train(), source
        self.optimizer = optimizer or torch.optim.AdamW(student.parameters(), 1e-4, fused=True)

    def take(self, batch: Batch, device: torch.device) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        targets = self._source(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            paths = self._student(batch.images).paths
        losses = distillation_losses(paths, targets)
        loss = torch.stack([levels.sum() for levels in losses.values()]).sum()
        torch.autograd.backward(loss)
        self.optimizer.step()
        loss.item()


def timed(
    step: Step, source: Iterator[Batch], count: int, device: torch.device
) -> tuple[float, float, float]:
    """Return the seconds of `count` steps, on the clock, of the processor, waiting for batches."""
    started, work, waited = time.perf_counter(), time.process_time(), 0.0
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(source)
        waited += time.perf_counter() - asked
        step.take(batch, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, time.process_time() - work, waited


def make_store(folder: Path, arguments: argparse.Namespace) -> tuple[Dataset, FeatureStore]:
    """Write random photographs and features."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(arguments.rows):
        pixels = random.integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8)
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{number:04d}.jpg", quality=90)
    dataset = open_dataset(FolderData(kind="folder", root=folder / "images"))
    files = [Path(str(dataset.path(image.id))) for image in dataset.images]
    count = len(files)
    table = ImageTable(
        ids=tuple(image.id for image in dataset.images),
        sha256=tuple(sha256(file.read_bytes()).hexdigest() for file in files),
        heights=(SIDE,) * count,
        widths=(SIDE,) * count,
        statuses=("ok",) * count,
    )
    path = folder / "features.zarr"
    create_store(path, table, whole_views(count, SIDE))
    for name in NAMES:
        spec = teacher(name, GRID, CHANNELS, arguments.codec)
        with FeatureWriter.open(path, spec, 64 << 20) as writer:
            for rows in writer.missing():
                shape = (len(rows), *GRID, CHANNELS)
                features = {
                    level.name: random.standard_normal(shape, np.float32) for level in spec.levels
                }
                writer.write(rows, features, None, np.ones(len(rows), bool))
            writer.finish()
    return dataset, FeatureStore(path)


def whole_views(count: int, side: int) -> Any:
    views = sample_views(count)
    boxes = np.tile(np.array([0, 0, side, side], np.float32), (count, 1))
    return type(views)(image_size=(side, side), boxes=boxes, flips=views.flips, seeds=views.seeds)


def teacher(name: str, grid: tuple[int, int], channels: int, codec: str) -> TeacherSpec:
    levels = tuple(
        LevelSpec(name=f"block_{block:02d}", grid=grid, channels=channels)
        for block in (2, 5, 8, 11)
    )
    return TeacherSpec(name=name, levels=levels, codec=codec, provenance={"weights": name})


def spec_of(student: Student, store: FeatureStore, cache_bytes: int) -> StreamSpec:
    return StreamSpec(
        ids=store.images.ids,
        teachers=NAMES,
        tasks=(),
        image_size=store.views.image_size,
        mean=student.mean,
        std=student.std,
        jitter=True,
        seed=0,
        cache_bytes=cache_bytes,
    )


def measure_growth(arguments: argparse.Namespace) -> None:
    """Run an epoch per number of images, each in a process of its own."""
    print("| images | microseconds per image | over the first | peak MiB |")
    print("|---|---|---|---|")
    first = 0.0
    for images in arguments.images:
        command = [sys.executable, __file__, "epoch", "--images", str(images)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        each, peak = (float(word) for word in printed.split())
        first = first or each
        print(f"| {images} | {each:.0f} | {each / first:.2f} | {peak:.0f} |", flush=True)


def measure_epoch(arguments: argparse.Namespace) -> None:
    (images,), batch, side = arguments.images, 50, 16
    device = torch.device("cpu")
    student = build_student(
        StudentConfig(
            model="vit_tiny_patch16_224",
            model_args={"embed_dim": 16, "depth": 4, "num_heads": 1},
            levels=4,
        ),
        (side, side),
        dict.fromkeys(NAMES, (8,) * 4),
        (),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "one.png"
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(file)
        store = StubStore(images, side, sha256(file.read_bytes()).hexdigest())
        sources = tuple(ImageSource(id=name, path=file) for name in store.images.ids)
        dataset = Dataset(images=sources, splits={"train": store.images.ids})
        stream = TargetStream(spec_of(student, store, 0), dataset, store)
        step = Step(student, CachedTargets(store, stream.levels, device))
        for _ in range(10):  # first calls are slow
            step.take(stream.__getitems__([Draw(epoch=0, index=k) for k in range(batch)]), device)
        started, steps = time.perf_counter(), images // batch
        for made in batches(stream, batch_size=batch, start=0, stop=steps, workers=0, pin=False):
            step.take(made, device)
        seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's
    peak = next(int(line.split()[1]) / 1024 for line in status.splitlines() if "VmHWM" in line)
    print(seconds / images * 1e6, peak)


class StubStore(FeatureStore):
    """A store of any size on no disk: every row is another one of a few."""

    def __init__(self, images: int, side: int, digest: str) -> None:
        table = sample_images(images)
        self._table = ImageTable(
            ids=table.ids,
            sha256=(digest,) * images,
            heights=(side,) * images,
            widths=(side,) * images,
            statuses=table.statuses,
        )
        self._views = whole_views(images, side)
        self._place = {name: row for row, name in enumerate(table.ids)}
        self._specs = {name: teacher(name, (1, 1), 8, "float16") for name in NAMES}
        self._some = np.random.default_rng(0).normal(size=(64, 1, 1, 8)).astype(np.float16)

    images = property(lambda self: self._table)  # type: ignore[assignment]
    views = property(lambda self: self._views)  # type: ignore[assignment]
    teachers = property(lambda self: self._specs)  # type: ignore[assignment]
    rows = property(lambda self: len(self._table.ids))  # type: ignore[assignment]

    def row(self, image_id: str, view: int = 0) -> int:
        return self._place[image_id]

    def codec(self, *which: Any) -> None:  # type: ignore[override]
        return None

    def array(self, *which: Any) -> Any:
        return SimpleNamespace(dtype="<f2", chunk=(300, 1, 1, 8), shape=(self.rows, 1, 1, 8))

    def read_codes_into(
        self, teacher: str, level: str, rows: Any, out: Any, resolution: Any = None
    ) -> None:
        out[...] = self._some[np.asarray(rows) % 64]


if __name__ == "__main__":
    main()
