from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stages.data.images import index_images
from stages.data.sources import ImageSource, list_folder
from stages.data.view import Box, whole_image_box
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.errors import (
    ExtractionError,
    ImageChangedError,
    NonFiniteFeaturesError,
)
from stages.extract.run import ExtractSummary, extract, extract_teacher
from stages.extract.teachers import Features, load_teacher
from stages.progress import NoProgress
from store.errors import StoreMismatchError
from store.images import ViewTable
from store.inspect import summarise
from store.reader import FeatureStore
from store.spec import LevelSpec, TeacherSpec
from store.testing import file_contents
from store.verify import verify
from store.writer import create_store

VIEW = (32, 48)
COUNT = 11
ROWS_PER_SHARD = 4
ROW_BYTES = 2 * 2 * 3 * 3
SHARD_BYTES = ROWS_PER_SHARD * (ROW_BYTES + 2 * 3) // 2  # mean of the level and the pooled output


SPEC = TeacherSpec(
    name="average",
    levels=(LevelSpec(name="block_00", grid=(2, 3), channels=3),),
    global_channels=3,
    provenance={"made": "up"},
)


@dataclass(kw_only=True)
class AverageTeacher:
    """Mean colour of each 16 x 16 block; `before` may interfere with a batch."""

    before: Callable[[Tensor], Tensor] = lambda images: images
    batches: list[int] = field(default_factory=list)
    spec: TeacherSpec = SPEC

    def preprocess(self, image: np.ndarray, box: Box) -> Tensor:
        cut = image[box.top : box.top + box.height, box.left : box.left + box.width]
        resized = Image.fromarray(cut).resize(VIEW[::-1], Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255

    def __call__(self, images: Tensor) -> Features:
        self.batches.append(len(images))
        means = torch.nn.functional.avg_pool2d(self.before(images), 16)
        return Features(
            levels={"block_00": means.permute(0, 2, 3, 1)}, pooled=means.mean(dim=(2, 3))
        )


@pytest.fixture
def sources(tmp_path: Path) -> tuple[ImageSource, ...]:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (40 + number, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return list_folder(folder)


@pytest.fixture
def store(tmp_path: Path, sources: tuple[ImageSource, ...]) -> Path:
    return new_store(tmp_path / "features.zarr", sources)


def new_store(path: Path, sources: tuple[ImageSource, ...], flip: bool = False) -> Path:
    images = index_images(sources, max_bad=0.9, progress=NoProgress())
    boxes = np.zeros((len(images), 4), np.float32)
    for row, (height, width) in enumerate(zip(images.heights, images.widths, strict=True)):
        if height:
            box = whole_image_box(height, width, VIEW)
            boxes[row] = (box.top, box.left, box.height, box.width)
    rows = len(images)
    views = ViewTable(
        image_size=VIEW,
        boxes=boxes,
        flips=np.full(rows, flip),
        seeds=np.zeros(rows, np.uint64),
    )
    create_store(path, images, views)
    return path


def run(
    store: Path, sources: tuple[ImageSource, ...], teacher: AverageTeacher, batch_size: int = 3
) -> ExtractSummary:
    return extract_teacher(store, sources, VIEW, teacher, batch_size, SHARD_BYTES, NoProgress())


def live(sources: tuple[ImageSource, ...], teacher: AverageTeacher) -> np.ndarray:
    answers = []
    for source in sources:
        image = np.array(Image.open(source.path))
        box = whole_image_box(*image.shape[:2], VIEW)
        answers.append(teacher(teacher.preprocess(image, box)[None]).levels["block_00"][0])
    return torch.stack(answers).numpy()


def test_the_store_holds_what_the_teacher_said(
    store: Path, sources: tuple[ImageSource, ...]
) -> None:
    summary = run(store, sources, AverageTeacher())
    features = FeatureStore(store)
    expected = live(sources, AverageTeacher())
    stored = features.read("average", "block_00", range(COUNT))
    np.testing.assert_array_equal(stored, expected.astype(np.float16))
    pooled = features.read("average", "global", range(COUNT))
    np.testing.assert_allclose(pooled, expected.mean(axis=(1, 2)), atol=1e-3)
    assert features.valid("average").all()
    assert (summary.images, summary.quarantined, summary.already_there) == (COUNT, 0, 0)
    assert summary.shards_written == 3
    assert summary.bytes_written == COUNT * (ROW_BYTES + 2 * 3)
    assert summary.images_per_second == pytest.approx(COUNT / summary.seconds)


def test_a_batch_never_spans_two_shards(store: Path, sources: tuple[ImageSource, ...]) -> None:
    teacher = AverageTeacher()
    run(store, sources, teacher, batch_size=3)
    assert teacher.batches == [3, 1, 3, 1, 3]


def test_a_finished_teacher_is_not_computed_again(
    store: Path, sources: tuple[ImageSource, ...]
) -> None:
    run(store, sources, AverageTeacher())
    before = file_contents(store)
    teacher = AverageTeacher()
    summary = run(store, sources, teacher)
    assert teacher.batches == []
    assert (summary.images, summary.already_there, summary.shards_written) == (0, COUNT, 0)
    assert file_contents(store) == before


@pytest.mark.parametrize("batches_done", range(5))
def test_a_resumed_store_is_the_same_to_the_byte(
    tmp_path: Path, store: Path, sources: tuple[ImageSource, ...], batches_done: int
) -> None:
    whole = new_store(tmp_path / "whole.zarr", sources)
    run(whole, sources, AverageTeacher())

    def stop(images: Tensor) -> Tensor:
        if len(stopped.batches) > batches_done:
            raise KeyboardInterrupt
        return images

    stopped = AverageTeacher(before=stop)
    with pytest.raises(KeyboardInterrupt):
        run(store, sources, stopped)
    resumed = AverageTeacher()
    summary = run(store, sources, resumed)
    shards_done = batches_done // 2
    assert summary.already_there == shards_done * ROWS_PER_SHARD
    assert sum(resumed.batches) == COUNT - shards_done * ROWS_PER_SHARD
    assert file_contents(store) == file_contents(whole)


def test_bad_images_are_left_out_without_shifting_the_others(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    expected = live(sources, AverageTeacher())
    bad = [1, 4, 5, 6, 7]  # the second shard entirely
    for number in bad:
        sources[number].path.write_bytes(b"no image")
    store = new_store(tmp_path / "bad.zarr", sources)
    summary = run(store, sources, AverageTeacher())
    features = FeatureStore(store)
    good = [number for number in range(COUNT) if number not in bad]
    assert np.flatnonzero(features.valid("average")).tolist() == good
    np.testing.assert_array_equal(
        features.read("average", "block_00", good), expected[good].astype(np.float16)
    )
    assert (summary.images, summary.quarantined) == (len(good), len(bad))


@pytest.mark.parametrize("change", ["edited", "removed", "damaged"])
def test_an_image_that_changed_is_named(
    store: Path, sources: tuple[ImageSource, ...], change: str
) -> None:
    path = sources[6].path
    if change == "edited":
        Image.new("RGB", (60, 46)).save(path)
    elif change == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ImageChangedError, match=r"image '06' changed since it was indexed: .*06"):
        run(store, sources, AverageTeacher())
    sources_again = sources[:6] + sources[7:]
    assert FeatureStore(store).unfinished == ("average",)
    with pytest.raises(ExtractionError, match="in the store only: 06"):
        run(store, sources_again, AverageTeacher())


def test_values_that_are_not_finite_are_refused_by_image(
    store: Path, sources: tuple[ImageSource, ...]
) -> None:
    def spoil(images: Tensor) -> Tensor:
        images[1:] *= torch.nan
        return images

    with pytest.raises(NonFiniteFeaturesError, match=r"'average', block_00: .* for 01, 02\."):
        run(store, sources, AverageTeacher(before=spoil))


def test_a_store_of_another_view_size_is_refused(
    store: Path, sources: tuple[ImageSource, ...]
) -> None:
    with pytest.raises(ExtractionError, match=r"views of \(32, 48\).*asked for \(32, 32\)"):
        extract_teacher(store, sources, (32, 32), AverageTeacher(), 3, SHARD_BYTES, NoProgress())


def test_a_data_set_with_more_images_than_the_store_is_refused(
    store: Path, sources: tuple[ImageSource, ...]
) -> None:
    more = (*sources, ImageSource(id="new", path=sources[0].path))
    with pytest.raises(ExtractionError, match="lists 11 images, the data set 12"):
        run(store, more, AverageTeacher())


def test_flipped_views_hold_the_answer_to_the_mirrored_image(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    store = new_store(tmp_path / "flipped.zarr", sources, flip=True)
    run(store, sources, AverageTeacher())
    for source in sources:
        pixels = np.array(Image.open(source.path))
        box = whole_image_box(*pixels.shape[:2], VIEW)
        cut = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
        Image.fromarray(np.ascontiguousarray(cut[:, ::-1])).save(source.path)
    mirrored = live(sources, AverageTeacher()).astype(np.float16)
    stored = FeatureStore(store).read("average", "block_00", range(COUNT))
    np.testing.assert_array_equal(stored, mirrored)


CONFIG = TeacherConfig(source="timm:test_vit", checkpoint="random", levels=2)


def test_a_configured_teacher_is_extracted(store: Path, sources: tuple[ImageSource, ...]) -> None:
    settings = ExtractConfig(batch_size=4, device="cpu", covariance=True)
    (summary,) = extract(store, sources, VIEW, {"vit": CONFIG}, settings, NoProgress())
    assert summary.images == COUNT
    teacher = load_teacher("vit", CONFIG, VIEW, torch.device("cpu"))
    image = np.array(Image.open(sources[8].path))
    inputs = teacher.preprocess(image, whole_image_box(*image.shape[:2], VIEW))
    features = teacher(inputs[None])
    reader = FeatureStore(store)
    for name, grid in features.levels.items():
        stored = reader.read("vit", name, [8])
        np.testing.assert_allclose(stored, grid.numpy(), rtol=1e-3, atol=1e-3)
        assert reader.statistics("vit", name).covariance is not None
    assert reader.teachers["vit"] == teacher.spec


def test_low_precision_is_compared_with_float32(
    store: Path, sources: tuple[ImageSource, ...]
) -> None:
    settings = ExtractConfig(batch_size=4, device="cpu")
    low = CONFIG.model_copy(update={"precision": "bf16"})
    (summary,) = extract(store, sources, VIEW, {"low": low}, settings, NoProgress())
    teacher = load_teacher("low", low, VIEW, torch.device("cpu"))
    assert [one.level for one in summary.drift] == [level.name for level in teacher.spec.levels]
    for one, level in zip(summary.drift, teacher.spec.levels, strict=True):
        assert one.tokens == COUNT * level.grid[0] * level.grid[1]
        assert 0.99 < one.cosine_p01 < one.cosine_mean < 1
        assert 1e-4 < one.relative_l2 < 0.05
    assert not extract(store, sources, VIEW, {"exact": CONFIG}, settings, NoProgress())[0].drift
    (again,) = extract(store, sources, VIEW, {"low": low}, settings, NoProgress())
    assert (again.images, again.drift) == (0, summary.drift)
    assert [one.drift for one in summarise(store).teachers] == [(), summary.drift]
    assert verify(store).clean


def test_another_teacher_of_the_same_name_is_refused(
    store: Path, sources: tuple[ImageSource, ...]
) -> None:
    settings = ExtractConfig(batch_size=4, device="cpu")
    extract(store, sources, VIEW, {"vit": CONFIG}, settings, NoProgress())
    other = CONFIG.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    with pytest.raises(StoreMismatchError, match=r"preprocessing\.mean"):
        extract(store, sources, VIEW, {"vit": other}, settings, NoProgress())
