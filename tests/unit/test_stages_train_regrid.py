"""Reused grids lie where the changed image does, and only where the store says that they may."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from stages.data.config import NyudData, PhotometricConfig, ViewsConfig
from stages.data.dataset import Dataset, open_dataset
from stages.data.images import index_images
from stages.data.view import Box, view_image
from stages.data.views import draw_views
from stages.extract.run import extract_teacher
from stages.extract.teachers import Features
from stages.progress import NoProgress
from stages.train.config import ReuseConfig
from stages.train.regrid import ReusedTargets, ReuseError, check_reuse, mirror, regrid
from stages.train.reuse import SMALLEST_SIDE, draw_part
from stages.train.sampling import Draw
from stages.train.stream import Batch, StreamSpec, TargetStream
from stages.train.targets import CachedTargets
from store.reader import FeatureStore
from store.spec import LevelSpec, TeacherSpec
from store.writer import create_store

SIZE = (32, 48)
FLIP, CROP = ReuseConfig(flip=0.99), ReuseConfig(flip=0.9, crop=0.9)
VIEWS = ViewsConfig(count=2, photometric=PhotometricConfig(brightness=0.2, contrast=0.3))


@dataclass(kw_only=True)
class Blocks:
    """Mean colour of each 8 x 8 block, which follows a flip exactly; or with the column added."""

    name: str
    follows: bool
    codec: str = "float32"

    @property
    def spec(self) -> TeacherSpec:
        level = LevelSpec(name="block_00", grid=(4, 6), channels=3)
        return TeacherSpec(name=self.name, levels=(level,), codec=self.codec, provenance={})

    def preprocess(self, image: np.ndarray, box: Box) -> Tensor:
        return torch.from_numpy(view_image(image, box, SIZE)).permute(2, 0, 1).float() / 255

    def __call__(self, images: Tensor) -> Features:
        means = F.avg_pool2d(images, 8)
        if not self.follows:
            means = means * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
        return Features(levels={"block_00": means.permute(0, 2, 3, 1)}, pooled=None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """NYUD's layout, smooth images; normals and classes follow the red channel."""
    root = tmp_path_factory.mktemp("data") / "nyud"
    for folder in ("images", "segmentation", "edge", "normals", "depth", "gt_sets"):
        (root / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    ids = [f"{index:04d}" for index in range(7)]
    for name in ids:
        coarse = Image.fromarray(generator.integers(0, 256, (5, 7, 3), np.uint8))
        pixels = np.array(coarse.resize((96, 64), Image.Resampling.BICUBIC))
        red = (pixels[..., 0] > 127).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        Image.fromarray(1 + red).save(root / "segmentation" / f"{name}.png")
        Image.fromarray(255 * red).save(root / "edge" / f"{name}.png")
        normals = np.where(red[..., None], [255, 128, 128], [0, 128, 128]).astype(np.uint8)
        Image.fromarray(normals).save(root / "normals" / f"{name}.png")
        np.save(root / "depth" / f"{name}.npy", (2.0 + red).astype(np.float32))
    (root / "gt_sets" / "train.txt").write_text("\n".join(ids[:6]))
    (root / "gt_sets" / "val.txt").write_text(ids[6])
    return open_dataset(NyudData(kind="nyud", root=root))


@pytest.fixture(scope="module")
def store(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    path = tmp_path_factory.mktemp("store") / "features.zarr"
    images = index_images(dataset.images, max_bad=0.0, progress=NoProgress())
    create_store(path, images, draw_views(images, SIZE, VIEWS))
    for teacher in (Blocks(name="good", follows=True), Blocks(name="bad", follows=False)):
        extract_teacher(
            path, dataset.images, SIZE, teacher, 4, 2**20, NoProgress(), equivariance_images=4
        )
    extract_teacher(
        path, dataset.images, SIZE, Blocks(name="unknown", follows=True), 4, 2**20, NoProgress()
    )
    return FeatureStore(path)


def make_stream(dataset: Dataset, store: FeatureStore, reuse: ReuseConfig) -> TargetStream:
    spec = StreamSpec(
        ids=store.images.ids,
        teachers=("good",),
        tasks=("segmentation", "depth", "normals"),
        image_size=SIZE,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        jitter=False,
        seed=1,
        cache_bytes=1 << 20,
        depth="scaled",
        reuse=reuse,
    )
    return TargetStream(spec, dataset, store)


def get(stream: TargetStream, epoch: int) -> Batch:
    return stream.__getitems__([Draw(epoch=epoch, index=index) for index in range(6)])


def grids(store: FeatureStore, stream: TargetStream, batch: Batch) -> Tensor:
    cached = CachedTargets(store, stream.levels, torch.device("cpu"))
    return ReusedTargets(cached, stream.spec.reuse)(batch)["good"].levels[0]


def test_a_mirrored_grid_is_the_grid_of_the_mirrored_image(
    dataset: Dataset, store: FeatureStore
) -> None:
    """The equivariant teacher, asked about what the student is shown, says what is reused."""
    stream, plain = make_stream(dataset, store, FLIP), make_stream(dataset, store, ReuseConfig())
    check_reuse(FLIP, store, ("good",))
    flips = 0
    for epoch in range(4):
        batch, before = get(stream, epoch), get(plain, epoch)
        assert batch.parts is not None
        assert before.parts is None
        answer = Blocks(name="good", follows=True)(batch.images).levels["block_00"]
        torch.testing.assert_close(grids(store, stream, batch), answer, rtol=0, atol=1e-6)
        for index, flip in enumerate(batch.parts[:, 0].bool().tolist()):
            flips += flip
            image, old = batch.images[index], before.images[index]
            assert image.equal(old.flip(2) if flip else old)
            classes, old = batch.labels["segmentation"][index], before.labels["segmentation"][index]
            there = (classes == (old.flip(1) if flip else old)).float().mean()
            assert there > 0.9  # the nearest pixel of an even number of them changes sides
            row = store.row(batch.ids[index], batch.views[index])
            mirrored = bool(store.views.flips[row]) != flip
            assert (batch.labels["normals"][index, 0] > 0).equal((classes == 1) ^ mirrored)
            depth = batch.labels["depth"][index]
            assert (depth == depth.max()).equal(classes == classes.max())
    assert 6 <= flips <= 18


def test_a_cut_grid_lies_on_the_cut_image(dataset: Dataset, store: FeatureStore) -> None:
    """Of a teacher that says what colour is there, resampled grids follow the image and labels."""
    stream = make_stream(dataset, store, CROP)
    errors, apart = [], []
    for epoch in range(4):
        batch = get(stream, epoch)
        shown = grids(store, stream, batch)
        answer = F.avg_pool2d(batch.images, 8).permute(0, 2, 3, 1)
        errors.append((shown - answer).abs().mean())
        apart.append((shown.flip(2) - answer).abs().mean())
        assert batch.parts is not None
        assert (batch.parts[:, 3:] >= SMALLEST_SIDE).all()
        red = batch.images[:, 0] > 0.65
        dark = batch.images[:, 0] < 0.35
        plain_colours = torch.tensor([view == 0 for view in batch.views])
        classes = batch.labels["segmentation"][plain_colours]
        assert (classes[red[plain_colours]] == 1).float().mean() > 0.9
        assert (classes[dark[plain_colours]] != 1).float().mean() > 0.9
    assert (torch.stack(errors) < 0.5 * torch.stack(apart)).all()


def test_images_are_drawn_again_in_every_epoch_and_the_same_for_all(
    dataset: Dataset, store: FeatureStore
) -> None:
    first, again = (get(make_stream(dataset, store, CROP), 3) for _ in range(2))
    assert first.parts is not None
    assert again.parts is not None
    assert first.parts.equal(again.parts)
    assert first.images.equal(again.images)
    other = get(make_stream(dataset, store, CROP), 4)
    assert other.parts is not None
    assert not first.parts.equal(other.parts)


@given(
    seed=st.integers(0, 2**63 - 1),
    name=st.text(),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
def test_parts_lie_inside_and_are_large_enough(seed: int, name: str, size: tuple[int, int]) -> None:
    box = draw_part(CROP, size, seed, 0, name).box
    for start, extent, full in ((box.top, box.height, size[0]), (box.left, box.width, size[1])):
        assert 0 <= start <= full - extent
        assert extent >= SMALLEST_SIDE * full
    kept = draw_part(FLIP, size, seed, 0, name).box
    assert (kept.top, kept.left, kept.height, kept.width) == (0, 0, *size)


@given(
    box=st.tuples(*[st.floats(0, 1)] * 4), flip=st.booleans(), slopes=st.tuples(*[st.floats(-2, 2)] * 2)
)  # fmt: skip
def test_a_gradient_is_resampled_at_the_right_place(
    box: tuple[float, float, float, float], flip: bool, slopes: tuple[float, float]
) -> None:
    """A grid that says where its cells are (rows, columns): exact away from the rim."""
    top, left = 0.5 * box[0], 0.5 * box[1]
    height, width = 0.5 + (0.5 - top) * box[2], 0.5 + (0.5 - left) * box[3]
    rows, columns = torch.meshgrid(
        (torch.arange(8) + 0.5) / 8, (torch.arange(10) + 0.5) / 10, indexing="ij"
    )
    places = torch.stack([rows, columns], dim=-1)[None]
    parts = torch.tensor([[float(flip), top, left, height, width]])
    found = regrid(places, parts)[0]
    across = 1 - columns if flip else columns
    expected = torch.stack([top + height * rows, left + width * across], dim=-1)
    clamped = torch.stack(
        [expected[..., 0].clamp(0.5 / 8, 7.5 / 8), expected[..., 1].clamp(0.05, 0.95)], dim=-1
    )
    torch.testing.assert_close(found, clamped, atol=1e-5, rtol=0)


def test_regrid_without_a_cut_mirrors() -> None:
    grid = torch.randn(2, 4, 5, 3)
    parts = torch.tensor([[1.0, 0, 0, 1, 1], [0.0, 0, 0, 1, 1]])
    assert mirror(grid, parts)[0].equal(grid[0].flip(1))
    assert mirror(grid, parts)[1].equal(grid[1])
    torch.testing.assert_close(regrid(grid, parts), mirror(grid, parts), atol=1e-5, rtol=0)


def test_levels_that_do_not_follow_are_refused_with_their_figures(store: FeatureStore) -> None:
    measured = store.equivariance("bad")
    assert measured is not None
    figure = measured.cosine["block_00"]["flip"]
    assert figure < 0.5
    with pytest.raises(
        ReuseError, match=rf"bad, block_00: flip {figure:.3f}.*asks for 0\.99"
    ) as no:
        check_reuse(FLIP, store, ("good", "bad"))
    assert "good" not in str(no.value)
    check_reuse(ReuseConfig(), store, ("bad", "unknown"))  # off
    with pytest.raises(ReuseError, match=r"bad, block_00: crop .*reuse\.crop asks for 0\.9"):
        check_reuse(CROP, store, ("bad",))


def test_teachers_that_were_not_measured_are_refused_with_the_command(store: FeatureStore) -> None:
    with pytest.raises(ReuseError, match=r"'unknown'.*sak extract-teachers unknown"):
        check_reuse(FLIP, store, ("good", "unknown"))


def test_the_command_that_a_refusal_names_measures_a_finished_teacher(
    dataset: Dataset, store: FeatureStore, tmp_path: Path
) -> None:
    path = tmp_path / "features.zarr"
    create_store(path, store.images, store.views)
    teacher = Blocks(name="good", follows=True)
    for images in (0, 2):
        assert images == 0 or FeatureStore(path).equivariance("good") is None
        extract_teacher(
            path, dataset.images, SIZE, teacher, 4, 2**20, NoProgress(), equivariance_images=images
        )
    check_reuse(FLIP, FeatureStore(path), ("good",))


def test_sampled_teachers_get_the_parts_of_their_images(
    dataset: Dataset, store: FeatureStore
) -> None:
    stream = make_stream(dataset, store, FLIP)
    batch = get(stream, 0)
    rows = torch.tensor([4, 1])
    codes = [level[rows] for level in batch.targets["good"]]
    some = replace(batch, targets={"good": codes}, target_rows={"good": rows})
    torch.testing.assert_close(grids(store, stream, some), grids(store, stream, batch)[rows])
