"""Runs a teacher over a few images and measures what extraction would meet: pace, codecs, losses.

Letters: `C` channels, `h w` cells of a grid, `n` rows.
"""

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from stages.extract.calibrate import batches, is_held_out
from stages.extract.clock import READING, StageClock
from stages.extract.encode import refuse_unstorable
from stages.extract.errors import NonFiniteFeaturesError
from stages.extract.measure_codecs import CodecCost, EncodingSample, measure_codec
from stages.extract.reading import RowReader, read_ahead
from stages.extract.teachers import Features
from stages.progress import Progress
from store.calibration import Calibration
from store.codecs import FLOAT16_MAX
from store.errors import StoreError
from store.pyramid import area_average, coarser, with_limits
from store.remote import StorePath
from store.spec import Grid, TeacherSpec

_KEPT_ROWS = 8  # rows that encoding is timed on


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureSettings:
    """What to measure.

    `codecs` by name; `limits` are the largest grids to consider, None for those configured;
    `student_grid` is what the student can resolve; `scratch` is a folder on the store's disk,
    where rows are written for the time that it takes and removed.
    """

    batch_size: int
    codecs: tuple[str, ...]
    limits: tuple[Grid | None, ...]
    student_grid: Grid
    scratch: StorePath
    covariance: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCost:
    """What was measured on `images` images; seconds are per image, all threads at work.

    Codecs were measured on `tokens` tokens or more per target, of the `held_out` images that they
    were not fitted to.
    `codecs` and `blur` hold every target of `measured`, the teacher at every limit; `blur` is the
    mean cosine that a target's grid loses against the student's, see `_Blur`.
    """

    spec: TeacherSpec
    measured: TeacherSpec
    images: int
    batch_size: int
    decode_seconds: float
    shared_seconds: float
    """The part of `decode_seconds` that is the same for every teacher: to read and decode."""
    forward_seconds: float
    held_out: int
    tokens: int
    codecs: Mapping[str, CodecCost]
    blur: Mapping[str, float]


def measure_teacher(rows: RowReader, settings: MeasureSettings, progress: Progress) -> TeacherCost:
    """Measure a teacher on every readable row of `rows`, in their order.

    Raises:
        StoreError: fewer than two images are readable.
        NonFiniteFeaturesError: the teacher answered with NaN or infinity.
    """
    chosen = [row for row in range(len(rows.views)) if rows.is_ok(row)]
    if len(chosen) < 2:
        raise StoreError(
            f"{len(chosen)} of {len(rows.images)} sampled images can be read; measuring needs at "
            "least 2: repair them, or sample more with --measure-images"
        )
    spec = rows.teacher.spec
    progress.start(f"measure {spec.name}", 2 * len(chosen) + len(settings.codecs))
    inputs, decode_seconds = _decode(rows, chosen, settings.batch_size, progress)
    gathered = _Gathered.begin(spec, settings, len(chosen))
    forward_seconds = _forward(rows, inputs, settings.batch_size, gathered, progress)
    codecs = {}
    for codec in _possible(settings.codecs, spec, gathered):
        codecs[codec] = measure_codec(
            codec, spec, gathered.calibration, gathered.kept, settings.scratch, settings.covariance
        )
        progress.advance(note=codec)
    return TeacherCost(
        spec=spec,
        measured=gathered.spec,
        images=len(chosen),
        batch_size=min(settings.batch_size, len(chosen)),
        decode_seconds=decode_seconds,
        shared_seconds=decode_seconds * _shared(rows.clock),
        forward_seconds=forward_seconds,
        held_out=sum(map(is_held_out, range(len(chosen)))),
        tokens=min(gathered.calibration.held_out_tokens(one) for one in spec.targets),
        codecs=codecs,
        blur=gathered.blur(),
    )


def _shared(clock: StageClock) -> float:
    """Return the share of reading threads' time that does not depend on the teacher."""
    every = sum(clock.seconds.get(stage, 0.0) for stage in READING)
    return 1 - clock.seconds.get("preprocess", 0.0) / every if every else 0.0


def _decode(
    rows: RowReader, chosen: list[int], batch_size: int, progress: Progress
) -> tuple[list[Tensor], float]:
    """Return the inputs, and the seconds each took, read by as many threads as extraction has."""
    inputs = []
    started = time.perf_counter()
    with closing(read_ahead(rows.load, chosen, rows.readers, 2 * batch_size)) as images:
        for image in images:
            inputs.append(image)
            progress.advance(note="decode")
    return inputs, (time.perf_counter() - started) / len(inputs)


def _forward(
    rows: RowReader,
    inputs: list[Tensor],
    batch_size: int,
    gathered: "_Gathered",
    progress: Progress,
) -> float:
    """Run the teacher, hand its features over, and return the seconds per image."""
    rows.teacher(torch.stack(inputs[:batch_size]))  # the first batch is slower than all others
    seconds, position = 0.0, 0
    for batch in batches(inputs, batch_size):
        started = time.perf_counter()
        features = rows.teacher(batch)
        levels = {name: values.cpu().numpy() for name, values in features.levels.items()}
        seconds += time.perf_counter() - started
        ids = [f"number {position + index} of the sample" for index in range(len(batch))]
        refuse_unstorable(features, rows.teacher.spec, ids)
        gathered.add(levels, features, position)
        position += len(batch)
        progress.advance(len(batch), "forward")
    return seconds / len(inputs)


def _possible(codecs: tuple[str, ...], spec: TeacherSpec, gathered: "_Gathered") -> list[str]:
    """Return the codecs without float16 where that cannot hold the values.

    Raises:
        NonFiniteFeaturesError: float16 cannot, and is asked for.
    """
    if gathered.largest <= FLOAT16_MAX:
        return list(codecs)
    if spec.codec == "float16":
        raise NonFiniteFeaturesError(
            f"teacher {spec.name!r} answers with values up to {gathered.largest:.3g}, float16 ends "
            f"at {FLOAT16_MAX:.0f}: give it codec: int8, or float32"
        )
    return [codec for codec in codecs if codec != "float16"]


@dataclass(slots=True, kw_only=True)
class _Gathered:
    """Features of the sample: tokens to fit and measure codecs on, some whole rows to time."""

    spec: TeacherSpec
    """With every grid that is considered."""
    reference: Mapping[str, Grid]
    calibration: Calibration
    kept: EncodingSample
    lost: dict[str, list[float]] = field(default_factory=dict)
    largest: float = 0.0

    @classmethod
    def begin(cls, spec: TeacherSpec, settings: MeasureSettings, rows: int) -> "_Gathered":
        """Gather nothing yet."""
        every = with_limits(spec, settings.limits)
        return cls(
            spec=every,
            reference={
                level.name: coarser(level.stored[0], settings.student_grid)
                for level in spec.levels
            },
            calibration=Calibration(every, rows),
            kept=EncodingSample(),
        )  # fmt: skip

    def add(
        self, levels: Mapping[str, NDArray[np.float32]], features: Features, position: int
    ) -> None:
        """Take a batch, n h w C per level, whose first row is number `position` of the sample."""
        count = len(next(iter(levels.values())))
        for index in range(count):
            row = {name: values[index] for name, values in levels.items()}
            self.calibration.add(row, held_out=is_held_out(position + index))
            for target in self.spec.targets:
                reference = self.reference[target.level]
                lost = blur_of(row[target.level], target.grid, reference)
                self.lost.setdefault(target.name, []).append(lost)
        self.largest = max(self.largest, *(float(np.abs(one).max()) for one in levels.values()))
        pooled = None if features.pooled is None else features.pooled.cpu().numpy()
        self.kept.add(levels, pooled, _KEPT_ROWS)

    def blur(self) -> dict[str, float]:
        """Return the mean loss of each target's grid."""
        return {name: float(np.mean(values)) for name, values in self.lost.items()}


def blur_of(row: NDArray[np.float32], grid: Grid, reference: Grid) -> float:
    """Return 1 - mean token cosine between a row (h, w, C) at `reference` and at a coarser grid.

    The coarser one is brought back bilinearly, as the training loss does. What is finer than the
    reference, the grid that the student resolves, loses nothing: the student cannot follow it.
    """
    small = coarser(grid, reference)
    if small == reference:
        return 0.0
    exact = torch.from_numpy(np.array(area_average(row, reference)))
    left = torch.from_numpy(np.array(area_average(row, small))).permute(2, 0, 1)[None]
    back = functional.interpolate(left, size=reference, mode="bilinear")[0].permute(1, 2, 0)
    return 1 - float(functional.cosine_similarity(exact, back, dim=-1).mean())
