"""One (teacher, shard) unit as a worker process does it: told in a few hundred bytes, no arrays.

The teacher, and the tables of images and views, are read once per process. All of this runs on
workers; whoever hands out units needs neither weights nor images.
"""

import pickle
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from stages.data.config import DataConfig
from stages.data.dataset import open_dataset
from stages.extract.clock import StageTimes
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.run import Extraction, open_extraction
from stages.extract.teachers import choose_device, load_teacher
from stages.memory import keep_freed_memory
from stages.progress import NoProgress
from store.drift import LevelDrift, read_drift
from store.remote import locate
from store.tables import read_root
from store.writer import FeatureWriter

_Config = TypeVar("_Config", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One teacher to extract: what a worker has to know, as the parameter file says it."""

    store: str
    data: DataConfig
    image_size: tuple[int, int]
    name: str
    teacher: TeacherConfig
    settings: ExtractConfig

    def anywhere(self) -> "Job":
        """Return the same job with absolute paths, for a process in another folder."""
        return replace(
            self,
            store=str(locate(self.store)),
            data=_absolute(self.data),
            teacher=_absolute(self.teacher),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What a teacher needs: rows of the store, stored bytes of each, and ranges not committed."""

    rows: int
    row_bytes: int
    missing: tuple[range, ...]
    drift: tuple[LevelDrift, ...]
    """See `ExtractSummary`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSummary:
    """What came of a unit; not `written` where another process was at it or had committed it."""

    rows: range
    images: int
    seconds: float
    written: bool
    stages: StageTimes | None = None
    """Where its time went; None where it was not written."""


class _Process:
    """What this process keeps between units: the last teacher; one thread at a time uses it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._key = b""
        self._extraction: Extraction | None = None

    def open(self, job: Job) -> Extraction:
        root = read_root(locate(job.store))
        key = pickle.dumps((job, root.images_digest, root.views_digest))
        if self._extraction is None or key != self._key:
            self._extraction = None  # before the next one takes memory too
            self._extraction = _open(job)
            self._key = key
        return self._extraction


_process = _Process()


def begin(job: Job) -> Begun:
    """Begin or resume a teacher, its codecs fitted where needed, and say what is missing."""
    with _process.lock, _process.open(job).begin(NoProgress()) as writer:
        spec = writer.layout.spec
        return Begun(
            rows=writer.rows,
            row_bytes=writer.row_bytes,
            missing=tuple(writer.missing()),
            drift=read_drift(locate(job.store) / spec.name, spec),
        )


def extract_unit(job: Job, rows: range) -> UnitSummary:
    """Compute and commit one shard, unless another process is at it or has committed it."""
    with _process.lock:
        extraction = _process.open(job)
        started = time.perf_counter()
        with FeatureWriter.join(job.store, extraction.spec) as writer:
            written = writer.claim(rows)
            stages = extraction.write(writer, [rows]) if written else None
        return UnitSummary(
            rows=rows,
            images=extraction.images_in(rows) if written else 0,
            seconds=time.perf_counter() - started,
            written=written,
            stages=stages,
        )


def finish(job: Job) -> None:
    """Merge the statistics and mark the teacher as finished, if nobody has."""
    with (
        _process.lock,
        FeatureWriter.join(job.store, _process.open(job).spec) as writer,
    ):
        writer.finish()


def wait_for_unit() -> None:
    """Return when this process is at no unit any more."""
    with _process.lock:
        pass


def _open(job: Job) -> Extraction:
    keep_freed_memory()
    device = choose_device(job.settings.device)
    return open_extraction(
        job.store,
        open_dataset(job.data).images,
        job.image_size,
        load_teacher(job.name, job.teacher, job.image_size, device),
        job.settings,
    )


def _absolute(config: _Config) -> _Config:
    paths: Mapping[str, Any] = {
        name: value.absolute() for name, value in config if isinstance(value, Path)
    }
    patterns = getattr(config, "shards", ())
    if patterns:  # of a WebDataset: paths or URLs with wildcards
        local = (one if "://" in one else str(Path(one).absolute()) for one in patterns)
        paths = {**paths, "shards": tuple(local)}
    return config.model_copy(update=dict(paths))
