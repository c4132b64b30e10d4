"""With several views per image, a batch's targets are the teacher's answer to its very pixels."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from stages.data.config import NyudData, PhotometricConfig, ViewsConfig
from stages.data.dataset import Dataset, open_dataset
from stages.data.images import index_images
from stages.data.view import Box, view_image
from stages.data.views import draw_views, row_view
from stages.extract.reading import RowReader
from stages.extract.run import extract_teacher
from stages.extract.teachers import Features
from stages.progress import NoProgress
from stages.train.sampling import Draw, choose_view
from stages.train.stream import Batch, StreamSpec, TargetStream, batches, usable_ids
from store.reader import FeatureStore
from store.spec import LevelSpec, TeacherSpec
from store.writer import create_store

SIZE = (24, 32)
VIEWS = 3
CONFIG = ViewsConfig(
    count=VIEWS,
    aspect=1.3,
    photometric=PhotometricConfig(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
    depth="scaled",
)
TRAIN = 10
SPEC = TeacherSpec(
    name="blocks",
    levels=(LevelSpec(name="block_00", grid=(3, 4), channels=3),),
    codec="float32",
    provenance={"made": "up"},
)


@dataclass(kw_only=True)
class BlockTeacher:
    """Mean colour of each 8 x 8 block: a function of the pixels that says what they were."""

    spec: TeacherSpec = SPEC

    def preprocess(self, image: np.ndarray, box: Box) -> Tensor:
        return torch.from_numpy(view_image(image, box, SIZE)).permute(2, 0, 1).float() / 255

    def __call__(self, images: Tensor) -> Features:
        means = torch.nn.functional.avg_pool2d(images, 8)
        return Features(levels={"block_00": means.permute(0, 2, 3, 1)}, pooled=None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """NYUD's layout. A marker: classes, depth and edges follow the red channel, which is 0 or 250."""
    root = tmp_path_factory.mktemp("data") / "nyud"
    for folder in ("images", "segmentation", "edge", "normals", "depth", "gt_sets"):
        (root / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    ids = [f"{index:04d}" for index in range(TRAIN + 2)]
    for name in ids:
        height, width = generator.integers(40, 60, 2)
        coarse = generator.integers(0, 2, (4, 5)).astype(bool)
        red = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))
        noise = generator.integers(0, 100, (height, width, 2))
        pixels = np.dstack([250 * red, noise]).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        Image.fromarray((1 + red).astype(np.uint8)).save(root / "segmentation" / f"{name}.png")
        Image.fromarray((255 * red).astype(np.uint8)).save(root / "edge" / f"{name}.png")
        Image.fromarray(np.where(red[..., None], [255, 128, 128], [0, 128, 128]).astype(np.uint8)
                        ).save(root / "normals" / f"{name}.png")  # fmt: skip
        np.save(root / "depth" / f"{name}.npy", (2 + red).astype(np.float32))
    (root / "gt_sets" / "train.txt").write_text("\n".join(ids[:TRAIN]))
    (root / "gt_sets" / "val.txt").write_text("\n".join(ids[TRAIN:]))
    return open_dataset(NyudData(kind="nyud", root=root))


def make_store(path: Path, dataset: Dataset, config: ViewsConfig) -> FeatureStore:
    images = index_images(dataset.images, max_bad=0.0, progress=NoProgress())
    create_store(path, images, draw_views(images, SIZE, config))
    extract_teacher(path, dataset.images, SIZE, BlockTeacher(), 4, 2**20, NoProgress())
    return FeatureStore(path)


@pytest.fixture(scope="module")
def store(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("store") / "features.zarr", dataset, CONFIG)


@pytest.fixture(scope="module")
def spec(dataset: Dataset, store: FeatureStore) -> StreamSpec:
    return StreamSpec(
        ids=usable_ids(dataset, "train", store, ("blocks",)),
        teachers=("blocks",),
        tasks=("segmentation", "depth", "normals"),
        image_size=SIZE,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        jitter=False,
        seed=5,
        cache_bytes=1 << 20,
        depth="scaled",
    )


def epochs(stream: TargetStream, count: int, batch_size: int = 5, **how: int) -> Iterator[Batch]:
    steps = count * len(stream) // batch_size
    options = {"start": 0, "stop": steps, "workers": 0, "pin": False} | how
    return batches(stream, batch_size=batch_size, **options)


def test_targets_are_the_teachers_answer_to_the_pixels_of_the_batch(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    assert store.views.flips.any()
    teacher, seen = BlockTeacher(), 0
    for batch in epochs(TargetStream(spec, dataset, store), VIEWS):
        answer = teacher(batch.images).levels["block_00"]
        assert batch.targets["blocks"][0].equal(answer)
        seen += len(batch.ids)
    assert seen == VIEWS * TRAIN
    rows = store.read("blocks", "block_00", range(store.rows)).reshape(store.rows, -1)
    assert len(np.unique(rows, axis=0)) == store.rows  # so none could stand for another


def test_every_view_of_every_image_is_seen_once_in_as_many_epochs(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    stream = TargetStream(replace(spec, teachers=(), tasks=()), dataset, store)
    rounds = [
        [pair for batch in some for pair in zip(batch.ids, batch.views, strict=True)]
        for some in (
            list(epochs(stream, VIEWS)),
            list(epochs(stream, 2 * VIEWS, start=VIEWS * TRAIN // 5)),
        )
    ]
    for pairs in rounds:
        assert Counter(pairs) == Counter((name, view) for name in spec.ids for view in range(VIEWS))
    assert rounds[0] != rounds[1]


def test_a_resumed_stream_shows_the_same_views(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    jittered = replace(spec, jitter=True)
    whole = list(epochs(TargetStream(jittered, dataset, store), 2))
    rest = list(epochs(TargetStream(jittered, dataset, store), 2, start=1))
    for expected, other in zip(whole[1:], rest, strict=True):
        assert (other.ids, other.views) == (expected.ids, expected.views)
        assert other.images.equal(expected.images)
        assert other.targets["blocks"][0].equal(expected.targets["blocks"][0])
        assert other.labels["depth"].equal(expected.labels["depth"])


def test_labels_lie_where_the_pixels_do(dataset: Dataset, spec: StreamSpec, tmp_path: Path) -> None:
    """Red pixels are class 1, far, and look to the right; mirrored ones look to the left."""
    plain = CONFIG.model_copy(update={"photometric": None, "seed": 1})
    store = make_store(tmp_path / "plain.zarr", dataset, plain)
    flipped = 0
    for batch in epochs(TargetStream(spec, dataset, store), VIEWS):
        for index, (name, view) in enumerate(zip(batch.ids, batch.views, strict=True)):
            red = batch.images[index, 0] * 255
            sure = (red < 1) | (red > 249)  # no mixture of both
            assert sure.float().mean() > 0.5
            there = red[sure] > 100
            assert (batch.labels["segmentation"][index][sure] == 1).equal(there)
            far = batch.labels["depth"][index]
            assert (far[sure] == far.max()).equal(there) or there.all() or not there.any()
            mirrored = bool(store.views.flips[store.row(name, view)])
            flipped += mirrored
            assert (batch.labels["normals"][index, 0][sure] > 0).equal(there ^ mirrored)
    assert 0 < flipped < VIEWS * TRAIN


def test_teacher_and_student_get_the_same_bytes_in_any_order_and_process(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    """The teacher's inputs, read backwards in another process, hash to the student's images."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[3])\n"
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        "found = spec_from_file_location('views_test', sys.argv[4])\n"
        "module = module_from_spec(found); sys.modules['views_test'] = module\n"
        "found.loader.exec_module(module)\n"
        "module.print_hashes(sys.argv[1], sys.argv[2])\n"
    )
    root = Path(__file__).parents[2]
    arguments = [str(store.path), str(dataset.label_root), str(root), __file__]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True
    )
    theirs = dict(line.split() for line in done.stdout.splitlines())
    stream = TargetStream(spec, dataset, store)
    ours = {}
    for epoch in range(VIEWS):
        batch = stream.__getitems__([Draw(epoch=epoch, index=index) for index in range(TRAIN)])
        for image, name, view in zip(batch.images, batch.ids, batch.views, strict=True):
            ours[str(store.row(name, view))] = sha256(image.numpy().tobytes()).hexdigest()
    assert len(ours) == VIEWS * TRAIN
    assert ours == {row: theirs[row] for row in ours}


def print_hashes(store_path: str, root: str) -> None:
    """Print the hash of every row's input, as the teacher gets it, last row first."""
    dataset = open_dataset(NyudData(kind="nyud", root=Path(root)))
    store = FeatureStore(store_path)
    reader = RowReader(
        teacher=BlockTeacher(),
        images=store.images,
        views=store.views,
        paths={image.id: image.path for image in dataset.images},
    )
    for row in reversed(range(store.rows)):
        print(row, sha256(reader.load(row).contiguous().numpy().tobytes()).hexdigest())


def test_an_image_enters_only_if_all_its_views_have_features(
    dataset: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = store.row("0003", 2)
    valid = np.arange(store.rows) != bad
    monkeypatch.setattr(FeatureStore, "valid", lambda self, teacher: valid)
    assert "0003" not in usable_ids(dataset, "train", store, ("blocks",))
    assert len(usable_ids(dataset, "train", store, ("blocks",))) == TRAIN - 1


def test_depth_of_enlarged_views_is_divided_only_where_asked(
    spec: StreamSpec, dataset: Dataset, store: FeatureStore
) -> None:
    draws = [Draw(epoch=0, index=index) for index in range(TRAIN)]
    scaled = TargetStream(spec, dataset, store).__getitems__(draws)
    metric = TargetStream(replace(spec, depth="metric"), dataset, store).__getitems__(draws)
    assert set(metric.labels["depth"].unique().tolist()) <= {2.0, 3.0}
    for index, view in enumerate(metric.views):
        ratio = (metric.labels["depth"][index] / scaled.labels["depth"][index]).unique()
        assert (ratio == 1).all() if view == 0 else (ratio > 1).all()


@given(seed=st.integers(0, 2**63 - 1), name=st.text(), views=st.integers(1, 8))
def test_views_take_turns(seed: int, name: str, views: int) -> None:
    for cycle in range(3):
        turns = range(cycle * views, (cycle + 1) * views)
        seen = [choose_view(seed, epoch, name, views) for epoch in turns]
        assert sorted(seen) == list(range(views))


def test_images_take_their_turns_apart() -> None:
    first = Counter(choose_view(0, 0, f"{number}", 3) for number in range(600))
    assert min(first.values()) > 150


def test_flips_and_colours_of_the_table_reach_the_pixels(
    dataset: Dataset, store: FeatureStore
) -> None:
    drawn = [row_view(store.views, row) for row in range(store.rows)]
    assert all(view.photometric is None and not view.flip for view in drawn[::VIEWS])
    assert all(view.photometric is not None for view in drawn[1::VIEWS] + drawn[2::VIEWS])
