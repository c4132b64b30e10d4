"""Compares stored features with what the teacher says today, on a sample of rows."""

from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.data.sources import ImageSource
from stages.extract.comparison import (
    Fidelity,
    LevelComparison,
    RowError,
    compare,
    row_errors,
)
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.encode import refuse_unstorable
from stages.extract.errors import ImageChangedError, NonFiniteFeaturesError
from stages.extract.reading import RowReader, open_rows, read_ahead
from stages.extract.teachers import Teacher, choose_device, load_teacher
from stages.progress import Progress
from store.errors import difference
from store.findings import Verification
from store.pyramid import area_average
from store.reader import FeatureStore
from store.remote import StorePath
from store.spec import GLOBAL, Target

_THREADS = 2


def check_live(
    store_path: str | StorePath,
    images: Sequence[ImageSource],
    image_size: tuple[int, int],
    name: str,
    teacher_config: TeacherConfig,
    extract_config: ExtractConfig,
    sample: int,
    found: Verification,
    progress: Progress,
) -> list[LevelComparison]:
    """Load a teacher and compare, as `check_live_teacher` does.

    Raises:
        TeacherError: the teacher cannot be built.
        ExtractionError: the store lists other images or views than the data set has.
        StoreError: the store cannot be read.
    """
    device = choose_device(extract_config.device)
    teacher = load_teacher(name, teacher_config, image_size, device)
    return check_live_teacher(
        store_path,
        images,
        image_size,
        teacher,
        extract_config.sample_batch_size,
        sample,
        found,
        progress,
    )


def check_live_teacher(
    store_path: str | StorePath,
    images: Sequence[ImageSource],
    image_size: tuple[int, int],
    teacher: Teacher,
    batch_size: int,
    sample: int,
    found: Verification,
    progress: Progress,
    seed: int = 0,
) -> list[LevelComparison]:
    """Compute a sample of rows again and note in `found` where the store says something else.

    Another teacher (weights, settings, preprocessing) and images that changed are findings of
    their own. Levels of another shape are not compared; the others are at each resolution stored.

    Raises:
        ExtractionError: the store lists other images or views than the data set has.
        StoreError: the store cannot be read, or has no such finished teacher.
    """
    name = teacher.spec.name
    store = FeatureStore(store_path)
    reader = open_rows(store_path, images, image_size, teacher)
    found.performed.add((name, "live"))
    targets = _comparable(store, teacher, found)
    rows = choose_rows(store, name, sample, seed)
    parts: dict[str, list[tuple[int, RowError]]] = {target: [] for target in targets}
    progress.start(f"recompute {name}", len(rows))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        good, fresh = _recompute(teacher, reader, batch, found)
        for key, target in targets.items() if good else ():
            errors = _errors(store, name, key, target, good, fresh)
            parts[key] += zip(good, errors, strict=True)
        progress.advance(len(batch))
    precision = str(teacher.spec.provenance.get("precision", "fp32"))
    compared = [
        compare(name, key, entries, precision, _loss(store, name, targets[key]))
        for key, entries in parts.items()
        if entries
    ]
    for one in compared:
        _note(one, reader, found)
    return compared


def choose_rows(store: FeatureStore, teacher: str, sample: int, seed: int) -> list[int]:
    """Return up to `sample` rows that have features, ascending: spread over shards, by hash of id.

    The same store, seed and size give the same rows on every machine.
    """
    views, ids = store.views.views_per_image, store.images.ids
    rows_per_shard = store.array(teacher, store.levels(teacher)[0]).chunk[0]
    shards: dict[int, list[tuple[str, int]]] = {}
    for row in np.flatnonzero(store.valid(teacher)).tolist():
        key = sha256(f"{seed}:{row % views}:{ids[row // views]}".encode()).hexdigest()
        shards.setdefault(row // rows_per_shard, []).append((key, row))
    ranked = [
        (rank, key, row)
        for entries in shards.values()
        for rank, (key, row) in enumerate(sorted(entries))
    ]
    return sorted(row for _, _, row in sorted(ranked)[:sample])


def _comparable(
    store: FeatureStore, teacher: Teacher, found: Verification
) -> dict[str, Target | None]:
    """Note how the stored teacher differs from this one; return what both have in the same shape.

    Targets are by name, `global` is None.
    """
    name, spec = teacher.spec.name, teacher.spec
    stored = store.teachers[name]
    lines = difference(stored.to_attributes(), spec.to_attributes())
    if lines:
        found.add(
            "suspect", "live",
            "the store's features are of another teacher than the parameter file asks for:\n"
            + "\n".join(lines),
            f"correct the parameter file, or `sak extract-teachers {name} --replace`", teacher=name,
        )  # fmt: skip
    shapes = {level.name: (level.grid, level.channels) for level in spec.levels}
    same: dict[str, Target | None] = {
        target.name: target
        for level in stored.levels
        for target in level.targets
        if shapes.get(level.name) == (level.grid, level.channels)
    }
    if spec.global_channels is not None and spec.global_channels == stored.global_channels:
        same[GLOBAL] = None
    return same


def _errors(
    store: FeatureStore,
    teacher: str,
    key: str,
    target: Target | None,
    rows: list[int],
    fresh: dict[str, NDArray[Any]],
) -> list[RowError]:
    """Compare rows of a target with fresh features of the levels, averaged as they were stored."""
    if target is None:
        return row_errors(store.read(teacher, key, rows), fresh[key])
    averaged = np.stack([area_average(row, target.grid) for row in fresh[target.level]])
    return row_errors(store.read(teacher, target.level, rows, target.grid), averaged)


def _loss(store: FeatureStore, teacher: str, target: Target | None) -> Fidelity | None:
    """Return what the codec of a target says that it loses, None where floats are stored."""
    fitted = None if target is None else store.codec(teacher, target.level, target.grid)
    if fitted is None:
        return None
    return Fidelity(cosine=fitted.fidelity.cosine_mean, relative_l2=fitted.fidelity.relative_l2)


def _recompute(
    teacher: Teacher, reader: RowReader, batch: Sequence[int], found: Verification
) -> tuple[list[int], dict[str, NDArray[Any]]]:
    """Return the rows that could be computed, and their features by level."""
    name, inputs = teacher.spec.name, {}

    def load(row: int) -> Tensor | ImageChangedError:
        try:
            return reader.load(row)
        except ImageChangedError as error:
            return error

    with closing(read_ahead(load, batch, _THREADS, len(batch))) as loaded:
        for row, result in zip(batch, loaded, strict=True):
            if isinstance(result, Tensor):
                inputs[row] = result
                continue
            mend = "put the old image back, or index the images anew into another store"
            image = reader.image_id(row)
            found.add("suspect", "live", str(result), mend, teacher=name, row=row, image=image)
    if not inputs:
        return [], {}
    features = teacher(torch.stack(list(inputs.values())))
    try:
        refuse_unstorable(features, teacher.spec, [reader.image_id(row) for row in inputs])
    except NonFiniteFeaturesError as error:
        mend = "check the teacher's weights and precision"
        found.add("suspect", "live", str(error), mend, teacher=name)
        return [], {}
    return list(inputs), {key: one.cpu().numpy() for key, one in features.outputs().items()}


def _note(one: LevelComparison, reader: RowReader, found: Verification) -> None:
    if not one.wrong_rows and not one.wrong_together:
        return
    what = (
        f"{len(one.wrong_rows)} of {one.rows} rows computed again differ from the store: cosine "
        f"mean {one.cosine_mean:.6f}, minimum {one.cosine_min:.6f}, relative L2 "
        f"{one.relative_l2:.2g}; allowed are {one.allowed.cosine:.6f} and "
        f"{one.allowed.relative_l2:.2g} for a row, {one.allowed_together.cosine:.6f} and "
        f"{one.allowed_together.relative_l2:.2g} for all of them"
    )
    mend = (
        f"if the parameter file is right: `sak extract-teachers {one.teacher} --replace`; a first "
        "look on the machine that extracted tells rounding from other features"
    )
    for row in one.wrong_rows or (None,):  # none: only together they are too far off
        found.add(
            "suspect", "live", what, mend, teacher=one.teacher, level=one.level, row=row,
            image=None if row is None else reader.image_id(row),
        )  # fmt: skip
