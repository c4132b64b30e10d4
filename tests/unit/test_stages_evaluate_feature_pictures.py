"""`sak inspect --picture`: colours of features, which images are drawn, and the sheet itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from stages.data.images import index_images
from stages.data.sources import list_folder
from stages.evaluate.feature_pictures import (
    Palette,
    choose_images,
    picture_levels,
    save_feature_sheet,
)
from stages.progress import NoProgress
from store.calibration import Calibration, FittedTarget
from store.create import create_store
from store.errors import StoreError
from store.images import ImageTable, ViewTable
from store.reader import FeatureStore
from store.spec import GLOBAL, LevelSpec, TeacherSpec
from store.testing import sample_features, sample_images, sample_views, write_rows
from store.writer import FeatureWriter

PARAMS = Path(__file__).parents[2] / "params.yaml"


def teacher(codec: str) -> TeacherSpec:
    return TeacherSpec(
        name=f"teacher_{codec}",
        levels=(
            LevelSpec(name="stage_1", grid=(6, 8), channels=6, stored=((6, 8), (3, 4))),
            LevelSpec(name="stage_2", grid=(2, 2), channels=2),
        ),
        global_channels=5,
        provenance={},
        codec=codec,
    )


def fill(path: Path, images: ImageTable, views: ViewTable, codecs: tuple[str, ...]) -> FeatureStore:
    create_store(path, images, views)
    valid = np.array([status == "ok" for status in images.statuses])
    for spec in map(teacher, codecs):

        def calibrate(spec: TeacherSpec = spec) -> dict[str, FittedTarget]:
            calibration = Calibration(spec, 4)
            features = sample_features(spec, range(8))
            features.pop(GLOBAL)
            for row in range(8):
                levels = {name: values[row] for name, values in features.items()}
                calibration.add(levels, held_out=row % 2 == 1)
            return calibration.fit(spec.codec)

        with FeatureWriter.open(path, spec, calibrate=calibrate) as writer:
            for rows in writer.missing():
                write_rows(writer, spec, rows, valid)
            writer.finish()
    return FeatureStore(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    images = sample_images(12, quarantined=[1, 2, 3, 4, 5, 6, 7])
    folder = tmp_path_factory.mktemp("store")
    return fill(folder / "features.zarr", images, sample_views(12), ("float16", "int8"))


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 7),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    kind=st.sampled_from([np.float16, np.float32]),
)
def test_any_tokens_have_colours_in_range(
    channels: int, grid: tuple[int, int], scale: float, kind: type[np.floating]
) -> None:
    tokens = np.random.default_rng(0).normal(0, scale, (2, *grid, channels)).astype(kind)
    palette = Palette.of(tokens)
    colours = palette.paint(tokens)
    assert colours.shape == (2, *grid, 3)
    assert np.isfinite(colours).all()
    assert 0 <= colours.min() <= colours.max() <= 1
    assert 0 <= palette.share(tokens) <= 1 + 1e-9


def test_the_first_component_is_red_and_its_largest_loading_positive() -> None:
    grey = np.linspace(0, 1, 100, dtype=np.float32).reshape(1, 10, 10)
    tokens = np.stack([grey, -3 * grey, 0 * grey], axis=-1)
    palette = Palette.of(tokens)
    colours = palette.paint(tokens)
    assert palette.axes[1, 0] > 0
    np.testing.assert_allclose(palette.share(tokens), 1, atol=1e-9)
    expected = ((0.98 - grey) / 0.96).clip(0, 1)
    np.testing.assert_allclose(colours[..., 0], expected, atol=1e-5)
    assert (colours[..., 1:] == 0.5).all()


def test_only_images_with_features_are_chosen(store: FeatureStore) -> None:
    good = {name for name, status in zip(store.images.ids, store.images.statuses, strict=True)
            if status == "ok"}  # fmt: skip
    assert set(choose_images(store, 100)) == good
    assert len(choose_images(store, 3)) == 3
    assert choose_images(store, 3) == choose_images(store, 100)[:3]
    with pytest.raises(StoreError, match="quarantined"):
        picture_levels(store, [store.images.ids[1]])


def test_every_level_is_drawn_at_every_resolution(store: FeatureStore) -> None:
    ids = choose_images(store, 4)
    pictures = picture_levels(store, ids)
    found = [(picture.teacher, picture.target.grid, picture.colours.shape) for picture in pictures]
    assert found == [
        (name, grid, (4, *grid, 3))
        for name in ("teacher_float16", "teacher_int8")
        for grid in ((6, 8), (3, 4), (2, 2))
    ]
    exact, coded = pictures[0], pictures[3]
    assert exact.title.startswith("stage_1, 6 x 8\nfloat16\n")
    assert coded.cosine is not None
    assert coded.cosine > 0.99
    np.testing.assert_allclose(exact.colours, coded.colours, atol=0.1)


def test_a_coarse_resolution_has_the_colours_of_the_fine_one(store: FeatureStore) -> None:
    fine, coarse, *_ = picture_levels(store, choose_images(store, 4))
    averaged = fine.colours.reshape(4, 3, 2, 4, 2, 3).mean(axis=(2, 4))
    assert np.abs(averaged - coarse.colours).mean() < 0.03


def test_the_same_store_gives_the_same_bytes(store: FeatureStore, tmp_path: Path) -> None:
    sheets = []
    for name in ("one.png", "two.png"):
        ids = choose_images(store, 2)
        save_feature_sheet(picture_levels(store, ids), ids, {}, (24, 32), tmp_path / name)
        sheets.append((tmp_path / name).read_bytes())
    assert sheets[0] == sheets[1]


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["inspect", *arguments])
    return done.exit_code, " ".join(done.output.split())


def test_without_params_only_features_are_drawn(store: FeatureStore, tmp_path: Path) -> None:
    code, output = run(str(store.path), "--picture", str(tmp_path / "a.png"))
    assert code == 0
    assert "the picture shows no images: --params" in output
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > sheet.height > 100


def test_mistakes_are_named(store: FeatureStore, tmp_path: Path) -> None:
    out = str(tmp_path / "a.png")
    code, output = run(str(store.path), "--picture", out, "--image", "room/0008")
    assert code == 2
    assert "did you mean 'room/0008-é'" in output
    assert "quarantined" in run(str(store.path), "--picture", out, "--image", "room/0001-é")[1]
    assert "name it .png" in run(str(store.path), "--picture", str(tmp_path / "a.jpg"))[1]
    assert not Path(out).exists()
    create_store(tmp_path / "empty.zarr", sample_images(2), sample_views(2))
    assert "no finished teacher" in run(str(tmp_path / "empty.zarr"), "--picture", out)[1]


def test_the_image_is_the_one_the_store_was_made_from(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 48), (40 * index, 200, 10)).save(folder / f"{index}.png")
    images = index_images(list_folder(folder), 0.0, NoProgress())
    views = ViewTable(
        image_size=(24, 32),
        boxes=np.tile(np.array([0, 0, 48, 64], np.float32), (3, 1)),
        flips=np.zeros(3, bool),
        seeds=np.zeros(3, np.uint64),
    )
    store = fill(tmp_path / "features.zarr", images, views, ("float16",))
    values = yaml.safe_load(PARAMS.read_text())
    values["data"] = {"kind": "folder", "root": str(folder)}
    values["tasks"] = []
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(values))
    out = tmp_path / "a.png"
    code, output = run(str(store.path), "--picture", str(out), "--params", str(params))
    assert code == 0, output
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    assert all((pixels == (40 * index, 200, 10)).all(axis=-1).sum() > 5000 for index in range(3))
    (folder / "1.png").unlink()
    assert "does not list 1" in run(str(store.path), "--picture", str(out), "--params", str(params))[1]  # fmt: skip
    Image.new("RGB", (64, 48), (255, 0, 0)).save(folder / "0.png")
    code, output = run(str(store.path), "--picture", str(out), "--params", str(params))
    assert code == 2
    assert "is not the one that" in output


def test_the_picture_needs_no_torch() -> None:
    code = "import sys, pipeline.picture, pipeline.tables; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
