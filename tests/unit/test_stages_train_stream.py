"""Batches carry the right image, labels and features of each id, whoever loads them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stages.data.config import NyudData
from stages.data.dataset import Dataset, open_dataset
from stages.data.images import decode_image, read_image
from stages.data.view import Box, view_image
from stages.train.sampling import Draw, TeachersPerImageError
from stages.train.stream import (
    Batch,
    StreamError,
    StreamSpec,
    TargetStream,
    batches,
    usable_ids,
)
from store.codecs import Codes
from store.images import ImageTable, ViewTable
from store.layout import ArrayLayout
from store.reader import FeatureStore
from store.spec import Grid, LevelSpec, TeacherSpec
from store.writer import FeatureWriter, create_store

SIZE = (24, 32)
TEACHERS = {"dino": ((3, 4), (6, 8)), "sam": ((5, 7), (4, 4))}


def make_data(root: Path, count: int = 12) -> Dataset:
    """NYUD's layout with random content, 40 x 50 pixels, two images for validation."""
    random = np.random.default_rng(0)
    ids = [f"{index:04d}" for index in range(count)]
    folders = ("images", "segmentation", "edge", "normals", "depth", "gt_sets")
    for folder in folders:
        (root / folder).mkdir(parents=True)
    for name in ids:
        for folder in ("images", "normals"):
            pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{name}.png")
        classes = random.integers(0, 41, (40, 50), dtype=np.uint8)
        Image.fromarray(classes).save(root / "segmentation" / f"{name}.png")
        edges = random.choice([0, 255], (40, 50)).astype(np.uint8)
        Image.fromarray(edges).save(root / "edge" / f"{name}.png")
        depth = random.uniform(1, 5, (40, 50)).astype(np.float32)
        np.save(root / "depth" / f"{name}.npy", depth)
    (root / "gt_sets" / "train.txt").write_text("\n".join(ids[:-2]))
    (root / "gt_sets" / "val.txt").write_text("\n".join(ids[-2:]))
    return open_dataset(NyudData(kind="nyud", root=root))


def make_store(path: Path, dataset: Dataset, quarantined: str = "0001") -> FeatureStore:
    """Random features; rows in reverse order of the data set, one image never valid."""
    ids = tuple(image.id for image in reversed(dataset.images))
    count = len(ids)
    boxes = np.tile(np.array([[1, 0, 38, 50]], np.float32), (count, 1))
    table = ImageTable(
        ids=ids,
        sha256=tuple(read_image(dataset.path(name)).sha256 for name in ids),
        heights=(40,) * count,
        widths=(50,) * count,
        statuses=tuple("broken" if name == quarantined else "ok" for name in ids),
    )
    views = ViewTable(
        image_size=SIZE, boxes=boxes, flips=np.zeros(count, bool), seeds=np.zeros(count, np.uint64)
    )
    create_store(path, table, views)
    random = np.random.default_rng(1)
    for name, grids in TEACHERS.items():
        levels = tuple(
            LevelSpec(name=f"block_{k}", grid=grid, channels=16 * (k + 1), stored=(grid, (2, 2)))
            for k, grid in enumerate(grids)
        )
        spec = TeacherSpec(name=name, levels=levels, provenance={"seed": 1})
        with FeatureWriter.open(path, spec) as writer:
            for rows in writer.missing():
                features = {
                    level.name: random.normal(size=(len(rows), *level.grid, level.channels))
                    for level in levels
                }
                valid = np.array([table.statuses[row] == "ok" for row in rows])
                writer.write(rows, features, None, valid)
            writer.finish()
    return FeatureStore(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_data(tmp_path_factory.mktemp("data") / "nyud")


@pytest.fixture(scope="module")
def store(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("store") / "features.zarr", dataset)


@pytest.fixture(scope="module")
def spec(dataset: Dataset, store: FeatureStore) -> StreamSpec:
    return StreamSpec(
        ids=usable_ids(dataset, "train", store, ("dino", "sam")),
        teachers=("sam",),
        tasks=("normals", "depth"),
        image_size=SIZE,
        mean=(0.5, 0.4, 0.3),
        std=(0.1, 0.2, 0.3),
        jitter=False,
        seed=0,
        cache_bytes=1 << 20,
    )


def read(spec: StreamSpec, dataset: Dataset, store: FeatureStore, *indices: int) -> Batch:
    stream = TargetStream(spec, dataset, store)
    return stream.__getitems__([Draw(epoch=0, index=index) for index in indices])


def test_everything_is_joined_by_image_id(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    batch = read(spec, dataset, store, 4, 0)
    assert batch.ids == (spec.ids[4], spec.ids[0])
    for index, name in enumerate(batch.ids):
        pixels = decode_image(dataset.path(name))
        view = view_image(pixels, Box(top=1, left=0, height=38, width=50), SIZE)
        expected = (view / 255 - [0.5, 0.4, 0.3]) / [0.1, 0.2, 0.3]
        np.testing.assert_allclose(batch.images[index].permute(1, 2, 0), expected, atol=1e-5)
        labels = dataset.labels(name, SIZE)
        np.testing.assert_array_equal(batch.labels["depth"][index], labels["depth"])
        normals = batch.labels["normals"][index].permute(1, 2, 0)
        np.testing.assert_array_equal(normals, labels["normals"])
        for level, target in zip(("block_0", "block_1"), batch.targets["sam"], strict=True):
            stored = store.read("sam", level, [store.row(name)])
            assert target.dtype == torch.float16
            np.testing.assert_array_equal(target[index], stored[0])


def test_only_what_is_asked_for_is_read(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    batch = read(spec, dataset, store, 1)
    assert set(batch.targets) == {"sam"}
    assert set(batch.labels) == {"normals", "depth"}
    unlabelled = read(replace(spec, tasks=(), teachers=()), dataset, store, 1)
    assert (unlabelled.labels, unlabelled.targets) == ({}, {})


def test_targets_not_asked_for_are_never_read(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[str, str, Grid]] = []
    read_codes_into = FeatureStore.read_codes_into

    def counted(
        self: FeatureStore, teacher: str, level: str, rows: list[int], out: Codes, grid: Grid
    ) -> None:
        reads.append((teacher, level, grid))
        read_codes_into(self, teacher, level, rows, out, grid)

    monkeypatch.setattr(FeatureStore, "read_codes_into", counted)
    read(spec, dataset, store, 1, 2)
    assert reads == [("sam", "block_0", (5, 7)), ("sam", "block_1", (4, 4))]
    read(replace(spec, resolution=(2, 2)), dataset, store, 1)
    assert reads[2:] == [("sam", "block_0", (2, 2)), ("sam", "block_1", (2, 2))]
    read(replace(spec, teachers=()), dataset, store, 1)
    assert len(reads) == 4


@pytest.mark.parametrize("count", [1, 2])
def test_sampled_teachers_divide_what_is_read(
    count: int, spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    both = replace(spec, teachers=("dino", "sam"))
    everything = read(both, dataset, store, *range(9))
    stream = TargetStream(replace(both, teachers_per_image=count), dataset, store)
    read_bytes = 0
    for epoch in range(2):  # an image asks one teacher in the first, the other in the second
        batch = stream.__getitems__([Draw(epoch=epoch, index=index) for index in range(9)])
        for name, levels in batch.targets.items():
            rows = batch.target_rows[name]
            for level, all_of_them in zip(levels, everything.targets[name], strict=True):
                assert level.equal(all_of_them if rows is None else all_of_them[rows])
                read_bytes += level.nbytes
    full = sum(level.nbytes for levels in everything.targets.values() for level in levels)
    assert read_bytes == full * count
    with pytest.raises(TeachersPerImageError, match="dino, sam"):
        TargetStream(replace(both, teachers_per_image=3), dataset, store)


def test_the_order_follows_the_shards_of_the_targets(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = TargetStream(spec, dataset, store)
    assert set(stream.shuffle().shards) == {0}  # all rows fit into one shard
    array = FeatureStore.array

    def cut(self: FeatureStore, *which: Any) -> ArrayLayout:
        layout = array(self, *which)
        return replace(layout, chunk=(4 if which[1] == "block_0" else 5, *layout.chunk[1:]))

    monkeypatch.setattr(FeatureStore, "array", cut)
    rows = [store.row(image_id) // 5 for image_id in spec.ids]  # the store is in reverse order
    assert stream.shuffle().shards.tolist() == [row - min(rows) for row in rows]


def test_cached_views_give_the_same_batch(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    jittered = replace(spec, jitter=True)
    draws = [Draw(epoch=3, index=2), Draw(epoch=3, index=5)]
    warm = TargetStream(jittered, dataset, store)
    cold = TargetStream(replace(jittered, cache_bytes=0), dataset, store)
    first, second, third = (stream.__getitems__(draws) for stream in (warm, warm, cold))
    assert first.images.equal(second.images)
    assert first.images.equal(third.images)
    assert first.labels["depth"].equal(third.labels["depth"])
    assert not first.images.equal(read(jittered, dataset, store, 2, 5).images)


def test_unusable_images_never_enter_a_batch(dataset: Dataset, store: FeatureStore) -> None:
    listed = dataset.split("train")
    assert usable_ids(dataset, "train", store, ()) == tuple(n for n in listed if n != "0001")
    only_bad = replace(dataset, splits={"train": ("0001",)})
    with pytest.raises(StreamError, match="none of the 1 images"):
        usable_ids(only_bad, "train", store, ())


def test_worker_processes_change_nothing(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    streams = [TargetStream(replace(spec, jitter=True), dataset, store) for _ in range(2)]
    random = torch.get_rng_state()
    alone, helped = (
        list(batches(stream, batch_size=4, start=1, stop=5, workers=workers, pin=False))
        for stream, workers in zip(streams, (0, 1), strict=True)
    )
    assert len(alone) == 4
    for mine, theirs in zip(alone, helped, strict=True):
        assert mine.ids == theirs.ids
        assert mine.images.equal(theirs.images)
        assert mine.targets["sam"][1].equal(theirs.targets["sam"][1])
    assert torch.get_rng_state().equal(random)


def test_the_phase_picks_the_resolution(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    rows = [store.row(spec.ids[0])]
    both = replace(spec, teachers=("dino", "sam"))
    for limit, grids in {
        "finest": {"dino": [(3, 4), (6, 8)], "sam": [(5, 7), (4, 4)]},
        (4, 4): {"dino": [(3, 4), (2, 2)], "sam": [(2, 2), (4, 4)]},
        (2, 3): {"dino": [(2, 2), (2, 2)], "sam": [(2, 2), (2, 2)]},
    }.items():
        targets = read(replace(both, resolution=limit), dataset, store, 0).targets
        for name, expected in grids.items():
            for level, (target, grid) in enumerate(zip(targets[name], expected, strict=True)):
                stored = store.read(name, f"block_{level}", rows, grid)
                np.testing.assert_array_equal(target.numpy(), stored)
    with pytest.raises(StreamError, match=r"3 x 4, 2 x 2.*resolutions"):
        read(replace(both, resolution=(1, 9)), dataset, store, 0)
