"""Features computed again: the same teacher agrees, any other one or another image is caught."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stages.data.images import index_images
from stages.data.sources import ImageSource, list_folder
from stages.data.view import Box, whole_image_box
from stages.extract.comparison import Fidelity, LevelComparison, compare, row_errors, tolerance
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.live import check_live, check_live_teacher, choose_rows
from stages.extract.reading import RowReader
from stages.extract.run import extract, extract_teacher
from stages.extract.teachers import Features, NetworkTeacher, Teacher, load_teacher
from stages.progress import NoProgress
from store.findings import Finding, Verification
from store.images import ViewTable
from store.reader import FeatureStore
from store.spec import TeacherSpec
from store.writer import create_store

VIEW = (32, 48)
COUNT = 11
CONFIG = TeacherConfig(source="timm:test_vit", checkpoint="random", levels=2)
SETTINGS = ExtractConfig(batch_size=4, device="cpu")
SHARD_BYTES = -(-4 * (2 * 2 * 3 * 64 * 2 + 64 * 2) // 3)  # four rows of two levels and pooled


@pytest.fixture(scope="module")
def teacher() -> NetworkTeacher:
    made = load_teacher("vit", CONFIG, VIEW, torch.device("cpu"))
    assert isinstance(made, NetworkTeacher)
    return made


@pytest.fixture
def sources(tmp_path: Path) -> tuple[ImageSource, ...]:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (8, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((60, 40 + number)).save(folder / f"{number:02d}.png")
    (folder / "03.png").write_bytes(b"no image")
    return list_folder(folder)


@pytest.fixture
def store(tmp_path: Path, sources: tuple[ImageSource, ...], teacher: NetworkTeacher) -> Path:
    path = tmp_path / "features.zarr"
    images = index_images(sources, max_bad=0.9, progress=NoProgress())
    boxes = np.zeros((COUNT, 4), np.float32)
    for row, (height, width) in enumerate(zip(images.heights, images.widths, strict=True)):
        if height:
            box = whole_image_box(height, width, VIEW)
            boxes[row] = (box.top, box.left, box.height, box.width)
    seeds, flips = np.zeros(COUNT, np.uint64), np.zeros(COUNT, bool)
    create_store(path, images, ViewTable(image_size=VIEW, boxes=boxes, flips=flips, seeds=seeds))
    extract_teacher(path, sources, VIEW, teacher, 4, SHARD_BYTES, NoProgress())
    return path


class Altered:
    """A teacher that does something else than it says."""

    def __init__(self, teacher: Teacher, brightness: int = 0, scale: float = 1.0) -> None:
        self._teacher = teacher
        self._brightness = brightness
        self._scale = scale
        self.spec: TeacherSpec = teacher.spec

    def preprocess(self, image: np.ndarray, box: Box) -> Tensor:
        pixels = self._teacher.preprocess(image, box)
        return (pixels.int() + self._brightness).clamp(0, 255).byte()

    def __call__(self, images: Tensor) -> Features:
        features = self._teacher(images)
        levels = {name: grid * self._scale for name, grid in features.levels.items()}
        return Features(levels=levels, pooled=features.pooled)


def look(
    store: Path, sources: tuple[ImageSource, ...], teacher: Teacher, sample: int = 16
) -> tuple[list[LevelComparison], list[Finding]]:
    found = Verification(path=str(store))
    compared = check_live_teacher(store, sources, VIEW, teacher, 4, sample, found, NoProgress())
    assert (teacher.spec.name, "live") in found.performed
    assert found.clean == (not found.findings)
    return compared, found.findings


def test_the_same_teacher_agrees_within_rounding(
    store: Path, sources: tuple[ImageSource, ...], teacher: NetworkTeacher
) -> None:
    compared, findings = look(store, sources, teacher)
    assert findings == []
    assert {one.level for one in compared} == {"block_02/native", "block_05/native", "global"}
    for one in compared:
        assert one.rows == COUNT - 1  # the quarantined image has no features
        assert one.cosine_min > 0.999999
        assert 0 < one.relative_l2 < 5e-4  # float16 rounds by 2.1e-4


def test_other_weights_are_caught(store: Path, sources: tuple[ImageSource, ...]) -> None:
    torch.manual_seed(7)
    other = load_teacher("vit", CONFIG, VIEW, torch.device("cpu"))
    assert isinstance(other, NetworkTeacher)
    with torch.no_grad():
        other._network.module.patch_embed.proj.weight.mul_(1.01)  # type: ignore[operator,union-attr]
    compared, findings = look(store, sources, other)
    assert all(len(one.wrong_rows) == one.rows for one in compared if one.level != "global")
    assert {entry.severity for entry in findings} == {"suspect"}
    assert {entry.image for entry in findings} == {f"{n:02d}" for n in range(COUNT) if n != 3}
    assert "computed again differ from the store" in findings[0].what


def test_another_weights_file_of_the_same_name_is_named(
    tmp_path: Path, store: Path, sources: tuple[ImageSource, ...], teacher: NetworkTeacher
) -> None:
    weights = {name: value + 0.01 for name, value in teacher._network.module.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    config = CONFIG.model_copy(update={"checkpoint": tmp_path / "weights.pt"})
    found = Verification(path=str(store))
    check_live(store, sources, VIEW, "vit", config, SETTINGS, 3, found, NoProgress())
    assert "provenance.weights_sha256" in found.findings[0].what
    assert "sak extract-teachers vit --replace" in found.findings[0].mend
    assert any("differ from the store" in entry.what for entry in found.findings)


def test_another_preprocessing_is_caught_when_it_says_so(
    store: Path, sources: tuple[ImageSource, ...]
) -> None:
    config = CONFIG.model_copy(update={"mean": (0.4, 0.5, 0.5)})
    found = Verification(path=str(store))
    check_live(store, sources, VIEW, "vit", config, SETTINGS, 3, found, NoProgress())
    for name in ("config.mean", "preprocessing.mean", "probe_sha256"):
        assert name in found.findings[0].what
    assert any("differ from the store" in entry.what for entry in found.findings)


@pytest.mark.parametrize("change", [{"brightness": 3}, {"scale": 1.01}])
def test_another_preprocessing_is_caught_when_it_does_not(
    store: Path,
    sources: tuple[ImageSource, ...],
    teacher: NetworkTeacher,
    change: dict[str, float],
) -> None:
    _, findings = look(store, sources, Altered(teacher, **change))
    assert {entry.level for entry in findings} >= {"block_02/native", "block_05/native"}


def test_an_image_that_changed_on_disk_is_caught(
    store: Path, sources: tuple[ImageSource, ...], teacher: NetworkTeacher
) -> None:
    Image.new("RGB", (60, 46)).save(sources[6].path)
    compared, findings = look(store, sources, teacher)
    assert [(entry.row, entry.image) for entry in findings] == [(6, "06")]
    assert "changed since it was indexed" in findings[0].what
    assert {one.rows for one in compared} == {COUNT - 2}


def test_features_of_another_image_under_the_same_id_are_caught(
    tmp_path: Path, store: Path, sources: tuple[ImageSource, ...], teacher: NetworkTeacher
) -> None:
    """The table lists the new image, the features are those of the old one."""
    old = FeatureStore(store)

    wrong = tmp_path / "wrong.zarr"
    create_store(wrong, old.images, old.views)
    paths = {source.id: source.path for source in sources}
    shown = np.array(Image.open(paths["08"]))
    asked = RowReader(teacher=teacher, images=old.images, views=old.views, paths=paths).pixels(5)

    class Confused(Altered):
        def preprocess(self, image: np.ndarray, box: Box) -> Tensor:
            other = np.array(Image.fromarray(shown).resize(image.shape[1::-1]))
            return super().preprocess(other if np.array_equal(image, asked) else image, box)

    extract_teacher(wrong, sources, VIEW, Confused(teacher), 4, SHARD_BYTES, NoProgress())
    compared, findings = look(wrong, sources, teacher)
    assert {(entry.row, entry.image) for entry in findings} == {(5, "05")}
    assert all(one.wrong_rows == (5,) for one in compared)


def test_rows_are_spread_over_shards_and_depend_on_the_seed_only(
    store: Path, teacher: NetworkTeacher
) -> None:
    features = FeatureStore(store)
    assert features.array("vit", "block_05").chunk[0] == 4
    rows = choose_rows(features, "vit", 3, seed=0)
    assert [row // 4 for row in rows] == [0, 1, 2]
    assert rows == choose_rows(features, "vit", 3, seed=0)
    assert len({tuple(choose_rows(features, "vit", 3, seed)) for seed in range(8)}) > 1
    assert choose_rows(features, "vit", 100, seed=0) == [n for n in range(COUNT) if n != 3]


def test_a_model_of_other_levels_is_a_finding_not_a_crash(
    store: Path, sources: tuple[ImageSource, ...]
) -> None:
    config = CONFIG.model_copy(update={"levels": (0, 5)})
    found = Verification(path=str(store))
    compared = check_live(store, sources, VIEW, "vit", config, SETTINGS, 3, found, NoProgress())
    assert "levels" in found.findings[0].what
    assert "block_05/native" in {one.level for one in compared}
    assert "block_00/native" not in {one.level for one in compared}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_teachers_agree_with_themselves_in_other_batches(
    tmp_path: Path, store: Path, sources: tuple[ImageSource, ...], precision: str
) -> None:
    config = CONFIG.model_copy(update={"precision": precision})
    extract(store, sources, VIEW, {"half": config}, SETTINGS, NoProgress())
    found = Verification(path=str(store))
    one_by_one = ExtractConfig(batch_size=1, device="cpu")
    check_live(store, sources, VIEW, "half", config, one_by_one, 4, found, NoProgress())
    assert found.findings == []


@pytest.mark.parametrize("codec", ["int8", "pca-4bit"])
def test_coded_features_agree_within_what_the_codec_reports(
    store: Path, sources: tuple[ImageSource, ...], teacher: NetworkTeacher, codec: str
) -> None:
    """Every resolution is compared; other weights and features of another scale are caught."""
    levels = tuple(replace(level, stored=(level.grid, (1, 2))) for level in teacher.spec.levels)
    coded = Altered(teacher)
    coded.spec = replace(teacher.spec, name="coded", codec=codec, levels=levels)
    extract_teacher(
        store, sources, VIEW, coded, 4, SHARD_BYTES, NoProgress(), calibration_images=10
    )
    compared, findings = look(store, sources, coded)
    assert findings == []
    assert {one.level for one in compared} == {
        "block_02/native", "block_02/1x2", "block_05/native", "block_05/1x2", "global",
    }  # fmt: skip
    torch.manual_seed(7)
    other = load_teacher("vit", CONFIG, VIEW, torch.device("cpu"))
    assert isinstance(other, NetworkTeacher)
    with torch.no_grad():
        other._network.module.patch_embed.proj.weight.mul_(-1)  # type: ignore[operator,union-attr]
    # Ten small images fit 4 bits so badly that only gross differences exceed what is reported.
    gross = [Altered(teacher, scale=-1.0)]
    for wrong in [*gross, Altered(other)] if codec == "int8" else gross:
        wrong.spec = coded.spec
        _, findings = look(store, sources, wrong)
        assert {"block_02/native", "block_05/1x2"} <= {entry.level for entry in findings}


def test_tolerance_widens_with_the_codec_and_never_narrows() -> None:
    own = tolerance("fp32")
    assert (own.cosine, own.relative_l2) == (0.99999, 2e-3)
    codec = Fidelity(cosine=0.9998, relative_l2=0.02)
    one, many, all_of_them = (tolerance("fp32", codec, rows) for rows in (1, 16, 10**12))
    assert 0.99 < one.cosine < many.cosine < all_of_them.cosine < 0.9998
    assert one.relative_l2 == pytest.approx(2e-3 + 2 * 0.02 + 0.06)
    assert all_of_them.relative_l2 == pytest.approx(2e-3 + 1.25 * 0.02, rel=1e-4)
    assert tolerance("bf16", codec).cosine < one.cosine
    assert tolerance("bf16").cosine < tolerance("fp16").cosine < own.cosine


def test_errors_are_per_token_and_per_row() -> None:
    fresh = np.random.default_rng(0).normal(size=(3, 2, 2, 5))
    stored = fresh.copy()
    stored[1, 0, 0] *= -1
    fresh[2, 1, 1] = stored[2, 1, 1] = 0  # two tokens of zeros agree
    one = compare("t", "l", list(enumerate(row_errors(stored, fresh))), "fp32")
    assert one.cosine_min == pytest.approx(-1)
    assert one.cosine_mean == pytest.approx(1 - 2 / 12)
    assert one.relative_l2 == pytest.approx(
        2 * np.linalg.norm(fresh[1, 0, 0]) / np.linalg.norm(fresh)
    )
    assert one.wrong_rows == (1,)
    silent = row_errors(np.ones((1, 5)), np.zeros((1, 5)))[0]
    assert (silent.relative_l2, silent.cosines.tolist()) == (1.0, [0.0])
