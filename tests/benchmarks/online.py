"""Step time with teachers that run live over the same step with targets that are there already.

    python tests/benchmarks/online.py [--device cuda] [--size 96] [--width 192] [--teachers 3]

Multiply-adds predict the ratio: student forward and backward plus the teachers' forward, over the
student's alone; counted by torch's FlopCounterMode on one batch. Both steps are taken in turn, and
the median of each counts, so other work on the machine slows both. Weights are random: what is
measured does not depend on them.
"""

import argparse
import json
import time
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.data.view import whole
from stages.extract.config import TeacherConfig
from stages.extract.teachers import NetworkTeacher, load_teacher
from stages.train.config import PhaseConfig, RuntimeConfig, StudentConfig
from stages.train.learner import Learner
from stages.train.online import OnlineTargets
from stages.train.stream import Batch
from stages.train.student import build_student
from stages.train.targets import TargetSource, TeacherTargets

LEVELS = 4


def main() -> None:
    """Print one JSON object with times in seconds, multiply-adds and both ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=96, help="pixels of each side")
    parser.add_argument("--width", type=int, default=192, help="of student and teachers")
    parser.add_argument("--teacher-width", type=int, help="of the teachers, where it differs")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    size = (asked.size, asked.size)
    teachers = make_teachers(asked, size, device)
    batch = make_batch(teachers, asked.batch, size).to(device)
    levels = {
        name: [(level.name, level.grid) for level in teacher.spec.levels]
        for name, teacher in teachers.items()
    }
    live: TargetSource = OnlineTargets(teachers, levels)
    kept = live(batch)
    sources = {"online": live, "cached": Kept(kept)}
    loops = {name: make_learner(asked, teachers, size, source) for name, source in sources.items()}
    flops = {name: count(loop, batch) for name, loop in loops.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(asked.repeats):
        for name, loop in loops.items():
            times[name].append(timed(loop, batch, number, device))
    seconds = {name: median(values[1:]) for name, values in times.items()}  # the first warms up
    measured = seconds["online"] / seconds["cached"]
    predicted = flops["online"] / flops["cached"]
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "settings": vars(asked),
        "seconds": seconds,
        "multiply_adds": {name: value // 2 for name, value in flops.items()},
        "predicted_ratio": predicted,
        "measured_ratio": measured,
        "share_of_prediction": measured / predicted,
    }
    print(json.dumps(found, indent=2))


class Kept:
    """Targets that are on the device already."""

    def __init__(self, targets: dict[str, TeacherTargets]) -> None:
        self._targets = targets

    def __call__(self, batch: Batch) -> dict[str, TeacherTargets]:
        """Return them."""
        return self._targets


def _vit(width: int, depth: int) -> dict[str, object]:
    return {"embed_dim": width, "depth": depth, "num_heads": max(1, width // 64)}


def make_teachers(
    asked: argparse.Namespace, size: tuple[int, int], device: torch.device
) -> dict[str, NetworkTeacher]:
    """Load ViTs with random weights, patches of 16 pixels."""
    config = TeacherConfig(
        source="timm:vit_tiny_patch16_224",
        model_args=_vit(asked.teacher_width or asked.width, asked.depth),
        checkpoint="random",
        levels=LEVELS,
    )
    names = [f"teacher{number}" for number in range(asked.teachers)]
    return {name: load_teacher(name, config, size, device) for name in names}


def make_batch(teachers: dict[str, NetworkTeacher], count: int, size: tuple[int, int]) -> Batch:
    """Make noise for the student and the inputs that teachers make of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    inputs = {
        name: [torch.stack([teacher.preprocess(pixels, whole(pixels))] * count)]
        for name, teacher in teachers.items()
    }
    return Batch(
        ids=tuple(map(str, range(count))),
        views=(0,) * count,
        images=torch.randn(count, 3, *size),
        labels={},
        targets=inputs,
        target_rows=dict.fromkeys(teachers),
    )


def make_learner(
    asked: argparse.Namespace,
    teachers: dict[str, NetworkTeacher],
    size: tuple[int, int],
    source: TargetSource,
) -> Learner:
    """Build a student with a path per teacher, to be distilled."""
    config = StudentConfig(
        model="vit_tiny_patch16_224", model_args=_vit(asked.width, asked.depth), levels=LEVELS
    )
    channels = {name: [one.channels for one in t.spec.levels] for name, t in teachers.items()}
    student = build_student(config, size, channels, ())
    phase = PhaseConfig(steps=1000, batch_size=asked.batch, learning_rate=1e-4)
    return Learner(student, phase, RuntimeConfig(device=asked.device), {}, source)


def count(learner: Learner, batch: Batch) -> int:
    """Return the floating-point operations of a step, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        learner.recompute(batch, 0, 0)
    return int(counter.get_total_flops())


def timed(learner: Learner, batch: Batch, step: int, device: torch.device) -> float:
    """Return the seconds of one step's forward and backward passes."""
    started = time.perf_counter()
    learner.recompute(batch, step, 0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
