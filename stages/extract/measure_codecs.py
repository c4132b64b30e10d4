"""What a codec keeps and costs, measured on a few rows by the code that extraction writes with."""

import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from os import cpu_count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stages.extract.encode import Encoder
from stages.extract.teachers import Features
from store.calibration import Calibration, FittedTarget
from store.codecs import FLOATS, Codec, FloatCodec
from store.disk import existing_parent
from store.pending import PendingShard
from store.pyramid import area_average
from store.remote import StorePath
from store.sizes import future_record
from store.spec import GLOBAL, TeacherSpec
from store.teacher_layout import TeacherLayout

_Levels = Mapping[str, NDArray[np.float32]]
_ONE_SHARD = 2**50  # bytes: more than any sample has


@dataclass(slots=True)
class EncodingSample:
    """Whole rows to time encoding on, (n, h, w, C) of each level, (n, C) pooled."""

    rows: int = 0
    levels: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    pooled: NDArray[np.float32] | None = None

    def add(self, levels: _Levels, pooled: NDArray[np.float32] | None, limit: int) -> None:
        """Keep the first `limit` rows of the first batch."""
        if not self.rows:
            self.levels = {name: values[:limit].copy() for name, values in levels.items()}
            self.pooled = None if pooled is None else pooled[:limit].copy()
            self.rows = len(next(iter(self.levels.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecCost:
    """The codec of every target by name; seconds per row to encode and to decode.

    Encoding is that of all configured targets, with statistics and checksums, without waiting for
    the disk; decoding is that of each level's finest target, by one thread.
    """

    fitted: Mapping[str, FittedTarget]
    encode_seconds: float
    decode_seconds: float


def measure_codec(
    codec: str,
    spec: TeacherSpec,
    calibration: Calibration,
    sample: EncodingSample,
    scratch: StorePath,
    covariance: bool,
) -> CodecCost:
    """Fit a codec, and time it on whole rows."""
    fitted = calibration.fit(codec)
    record = future_record(
        replace(spec, codec=codec), fitted, 2 * sample.rows, _ONE_SHARD, covariance=covariance
    )
    return CodecCost(
        fitted=fitted,
        encode_seconds=_encode_seconds(record.layout, fitted, sample, scratch),
        decode_seconds=_decode_seconds(spec, fitted, sample),
    )


def _encode_seconds(
    layout: TeacherLayout,
    fitted: Mapping[str, FittedTarget],
    sample: EncodingSample,
    scratch: StorePath,
) -> float:
    """Write the rows twice into a shard that is thrown away, and time the second time."""
    codecs: dict[str, Codec] = {name: one.codec for name, one in fitted.items()}
    codecs[GLOBAL] = FloatCodec(dtype=FLOATS.get(layout.spec.codec, "<f2"))
    levels = {name: torch.from_numpy(values) for name, values in sample.levels.items()}
    pooled = None if sample.pooled is None else torch.from_numpy(sample.pooled)
    valid = np.ones(sample.rows, np.bool_)
    parent = existing_parent(scratch) if isinstance(scratch, Path) else None
    folder = Path(tempfile.mkdtemp(prefix=".sak-plan-", dir=parent))
    try:
        for array in layout.features().values():
            (folder / array.path).mkdir(parents=True)
        with ThreadPoolExecutor(cpu_count()) as pool:
            shard = PendingShard(folder, layout, 0, pool)
            encoder = Encoder(layout, codecs)
            features = Features(levels=levels, pooled=pooled)
            for _ in range(2):
                started = time.perf_counter()
                encoded = encoder(features, valid)
                shard.append(encoded.codes, encoded.moments, valid)
            seconds = time.perf_counter() - started
            shard.discard()
    finally:
        shutil.rmtree(folder)
    return seconds / sample.rows


def _decode_seconds(
    spec: TeacherSpec, fitted: Mapping[str, FittedTarget], sample: EncodingSample
) -> float:
    seconds = 0.0
    for level in spec.levels:
        target = level.targets[0]
        codec = fitted[target.name].codec
        codes = [
            codec.encode(area_average(row, target.grid)) for row in sample.levels[level.name]
        ]  # fmt: skip
        started = time.perf_counter()
        for one in codes:
            codec.decode(one)
        seconds += time.perf_counter() - started
    return seconds / sample.rows
