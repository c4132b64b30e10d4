"""What is measured of teachers that follow their image, and of such that do not."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from pipeline.cli import app
from stages.data.config import ViewsConfig
from stages.data.images import index_images
from stages.data.sources import ImageSource, list_folder
from stages.data.view import Box, view_image, whole, whole_image_box
from stages.data.views import draw_views
from stages.extract.equivariance import Windows, choose_images, nested_grids
from stages.extract.errors import NonFiniteFeaturesError
from stages.extract.reading import open_rows
from stages.extract.run import extract_teacher
from stages.extract.teachers import Features
from stages.progress import NoProgress
from store.create import create_store
from store.equivariance import TABLE, TRANSFORMS, Equivariance
from store.errors import StoreDamagedError
from store.reader import FeatureStore
from store.sizes import teacher_size
from store.spec import LevelSpec, TeacherSpec
from store.teacher import read_record
from store.testing import refuse_every_flip
from store.verify import verify

VIEW = (64, 96)
COUNT = 5
Answer = Callable[[Tensor], Tensor]


def symmetric(images: Tensor) -> Tensor:
    """Convolutions whose kernels are the same from left and right, then blocks of 8 x 8."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(12, 3, 5, 5, generator=generator)
    hidden = torch.nn.functional.conv2d(images, kernel + kernel.flip(3), padding=2).relu()
    return torch.nn.functional.avg_pool2d(hidden, 8)


def lopsided(images: Tensor) -> Tensor:
    """What differs from its left neighbour: mirrored, the answer has the other sign."""
    left = torch.nn.functional.pad(images, (1, 0, 0, 0), mode="replicate")[..., :-1]
    return torch.nn.functional.avg_pool2d((images - left)[..., ::1].sign(), 8) + 1e-3


def placed(images: Tensor) -> Tensor:
    """Where a cell lies, and next to nothing of what is there."""
    cells = torch.nn.functional.avg_pool2d(images, 8)
    rows, columns = cells.shape[2:]
    place = torch.stack(
        torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
    )
    return torch.cat([0.01 * cells[:, :1], place.expand(len(cells), 2, -1, -1)], dim=1)


@dataclass(kw_only=True)
class ConvTeacher:
    """A fixed function of its input, as fine grid and as one of half as many cells a side."""

    answer: Answer
    spec: TeacherSpec
    asked: int = 0

    def preprocess(self, image: np.ndarray, box: Box) -> Tensor:
        return torch.from_numpy(view_image(image, box, VIEW)).permute(2, 0, 1).float() / 255 - 0.5

    def __call__(self, images: Tensor) -> Features:
        self.asked += len(images)
        fine = self.answer(images)
        coarse = torch.nn.functional.avg_pool2d(fine, 2)
        levels = {"fine": fine.permute(0, 2, 3, 1), "coarse": coarse.permute(0, 2, 3, 1)}
        return Features(levels=levels, pooled=None)


def teacher(answer: Answer, channels: int) -> ConvTeacher:
    spec = TeacherSpec(
        name="conv",
        levels=(
            LevelSpec(name="fine", grid=(8, 12), channels=channels),
            LevelSpec(name="coarse", grid=(4, 6), channels=channels),
        ),
        provenance={"made": "up"},
    )
    return ConvTeacher(answer=answer, spec=spec)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSource, ...]:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).resize((190, 130), Image.Resampling.BICUBIC).save(
            folder / f"{number}.png"
        )
    (folder / "3.png").write_bytes(b"no image")
    return list_folder(folder)


def new_store(path: Path, sources: tuple[ImageSource, ...], views: int = 1) -> Path:
    images = index_images(sources, max_bad=0.9, progress=NoProgress())
    create_store(path, images, draw_views(images, VIEW, ViewsConfig(count=views)))
    return path


def run(
    path: Path, sources: tuple[ImageSource, ...], one: ConvTeacher, images: int = 16
) -> FeatureStore:
    extract_teacher(path, sources, VIEW, one, 2, 20_000, NoProgress(), equivariance_images=images)
    return FeatureStore(path)


def measured(path: Path, sources: tuple[ImageSource, ...], one: ConvTeacher) -> Equivariance:
    found = run(new_store(path, sources), sources, one).equivariance("conv")
    assert found is not None
    assert found.images == COUNT - 1  # one is quarantined
    return found


def test_symmetric_kernels_follow_a_flip_exactly(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    found = measured(tmp_path / "store", sources, teacher(symmetric, 12))
    for level in ("fine", "coarse"):
        assert found.cosine[level]["flip"] > 0.999999
        assert 0.97 < found.cosine[level]["crop"] < 1  # but for the padded border
        assert 0.5 < found.cosine[level]["scale"] < 0.999


def test_lopsided_kernels_do_not(tmp_path: Path, sources: tuple[ImageSource, ...]) -> None:
    found = measured(tmp_path / "store", sources, teacher(lopsided, 3))
    assert found.cosine["fine"]["flip"] < -0.5
    assert found.cosine["fine"]["crop"] > 0.95


def test_the_figures_are_those_that_numpy_finds_by_hand(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    """Flip and crop of the fine grid (8 x 12), from the files' pixels and the definitions alone."""
    one = teacher(lopsided, 3)
    found = measured(tmp_path / "store", sources, one)

    def answer(pixels: np.ndarray) -> np.ndarray:
        values = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255 - 0.5
        return one.answer(values[None])[0].permute(1, 2, 0).double().numpy()

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return float(((a * b).sum(-1) / lengths).mean())

    flips, crops = [], []
    for source in sources:
        if source.id == "3":
            continue
        pixels = np.asarray(Image.open(source.path).convert("RGB"))
        box = whole_image_box(pixels.shape[0], pixels.shape[1], VIEW)
        shown = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
        large = view_image(shown, whole(shown), (128, 192))  # twice, so that its half fills a view
        view = view_image(large, whole(large), VIEW)
        mirrored = view_image(np.ascontiguousarray(large[:, ::-1]), whole(large), VIEW)
        flips.append(cosine(answer(view)[:, ::-1], answer(mirrored)))
        # a quarter further: 1 of 4 rows and 2 of 6 columns of the coarsest grid, of 16 pixels each
        wide = view_image(shown, whole(shown), (64 + 16, 96 + 32))
        first, second = answer(wide[:64, :96]), answer(wide[16:, 32:])
        crops.append(cosine(first[2:, 4:], second[:-2, :-4]))
    assert found.cosine["fine"]["flip"] == pytest.approx(np.mean(flips), abs=1e-6)
    assert found.cosine["fine"]["crop"] == pytest.approx(np.mean(crops), abs=1e-6)
    assert -0.99 < np.mean(flips) < 0.99


def test_a_teacher_that_only_knows_the_place_follows_nothing(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    found = measured(tmp_path / "store", sources, teacher(placed, 3))
    for level in ("fine", "coarse"):
        assert all(found.cosine[level][name] < 0.95 for name in TRANSFORMS)
        assert found.cosine[level]["flip"] < 0.5


def test_windows_of_one_scale_show_the_same_pixels_where_they_overlap() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
    for grid in ((4, 6), (5, 7), (1, 3), (2, 2), (14, 18)):
        windows = Windows.of(grid, VIEW)
        view, mirrored, enlarged, first, second = windows.cut(pixels)
        height, width = windows.cell
        top, left = windows.shift[0] * height, windows.shift[1] * width
        shown = grid[0] * height, grid[1] * width
        assert first.shape[:2] == second.shape[:2] == shown
        np.testing.assert_array_equal(
            first[top:, left:], second[: shown[0] - top, : shown[1] - left]
        )
        np.testing.assert_array_equal(view[:, ::-1], mirrored)
        assert enlarged.shape[0] * grid[0] == view.shape[0] * windows.part[0]
        assert enlarged.shape[1] * grid[1] == view.shape[1] * windows.part[1]
        assert (windows.shift != (0, 0)) == (grid != (1, 1))


def test_a_single_cell_tells_nothing_of_crops() -> None:
    windows = Windows.of((1, 1), VIEW)
    found = windows.compare(torch.ones(5, 1, 1, 3, dtype=torch.float64))
    assert found["flip"] == 1
    assert math.isnan(found["crop"])
    assert math.isnan(found["scale"])


def test_levels_share_windows_where_their_grids_nest() -> None:
    grids = {"a": (24, 32), "b": (12, 16), "c": (6, 8), "d": (7, 8), "e": (14, 8)}
    assert nested_grids(grids) == {(6, 8): ["c", "b", "a"], (7, 8): ["d", "e"]}


def test_nothing_else_in_the_store_changes(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    def files(path: Path) -> dict[str, bytes]:
        found = (file for file in sorted((path / "conv").rglob("*")) if file.is_file())
        return {str(file.relative_to(path)): file.read_bytes() for file in found}

    with_it = new_store(tmp_path / "with", sources)
    without = new_store(tmp_path / "without", sources)
    asked = teacher(symmetric, 12)
    run(with_it, sources, asked)
    assert asked.asked == 5 * (COUNT - 1) + COUNT - 1
    run(without, sources, teacher(symmetric, 12), images=0)
    assert FeatureStore(without).equivariance("conv") is None
    more = files(with_it).keys() - files(without).keys()
    assert {name.split("/")[1] for name in more} == {"equivariance"}
    assert files(with_it) == {**files(without), **{name: files(with_it)[name] for name in more}}
    before = files(with_it)
    again = teacher(symmetric, 12)
    run(with_it, sources, again)
    assert (again.asked, files(with_it)) == (0, before)
    for path, known in ((with_it, True), (without, False)):
        assert verify(path).clean
        size = teacher_size(read_record(path / "conv"), [TABLE] if known else [])
        assert (size.bytes, size.files) == (sum(map(len, files(path).values())), len(files(path)))


@pytest.mark.parametrize("calls", range(7))
def test_a_run_that_is_stopped_ends_with_the_same_bytes(
    tmp_path: Path, sources: tuple[ImageSource, ...], calls: int
) -> None:
    def contents(path: Path) -> dict[str, bytes]:
        found = (file for file in sorted(path.rglob("*")) if file.is_file())
        return {str(file.relative_to(path)): file.read_bytes() for file in found}

    def stop(images: Tensor) -> Tensor:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return symmetric(images)

    whole, stopped = new_store(tmp_path / "a", sources), new_store(tmp_path / "b", sources)
    run(whole, sources, teacher(symmetric, 12))
    with pytest.raises(KeyboardInterrupt):
        run(stopped, sources, teacher(stop, 12))
    run(stopped, sources, teacher(symmetric, 12))
    assert contents(whole) == contents(stopped)


def test_a_deleted_description_takes_the_figures_along(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    path = new_store(tmp_path / "store", sources)
    run(path, sources, teacher(symmetric, 12))
    (path / "conv" / "zarr.json").unlink()
    found = run(path, sources, teacher(lopsided, 12 // 4)).equivariance("conv")
    assert found is not None
    assert found.cosine["fine"]["flip"] < 0


def test_only_whole_images_are_sampled_the_same_ones_always(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    path = new_store(tmp_path / "store", sources, views=3)
    rows = open_rows(path, sources, VIEW, teacher(symmetric, 12))
    every = choose_images(rows, 99)
    assert sorted(every) == [0, 3, 6, 12]
    assert choose_images(rows, 2) == every[:2]


def test_no_flipped_bit_goes_unseen(tmp_path: Path, sources: tuple[ImageSource, ...]) -> None:
    path = new_store(tmp_path / "store", sources)
    one = teacher(symmetric, 12)
    one = replace(one, spec=replace(one.spec, name="small"))
    run(path, sources, one)
    flipped = refuse_every_flip(path, path / "small" / "equivariance", per_file=6)
    assert len(flipped) == 5 * 6


def test_what_is_no_cosine_is_refused(tmp_path: Path, sources: tuple[ImageSource, ...]) -> None:
    path = new_store(tmp_path / "store", sources)
    run(path, sources, teacher(symmetric, 12))
    zarr.open_array(path / "conv" / "equivariance" / "cosine", mode="r+")[0, 0] = 1.5
    with pytest.raises(StoreDamagedError, match="figures that cannot be: mean cosines"):
        FeatureStore(path).equivariance("conv")
    assert not verify(path, quick=True).clean


def test_any_reader_opens_the_figures_and_inspect_shows_them(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    found = measured(tmp_path / "store", sources, teacher(symmetric, 12))
    array = zarr.open_array(tmp_path / "store" / "conv" / "equivariance" / "cosine", mode="r")
    assert array.metadata.dimension_names == ("level", "transform")
    assert array.attrs["levels"] == ["fine", "coarse"]
    assert array.attrs["transforms"] == ["flip", "crop", "scale"]
    assert array[1, 2] == found.cosine["coarse"]["scale"]
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "store"), "--json"])
    (shown,) = json.loads(result.stdout)["teachers"]
    assert shown["equivariance_images"] == COUNT - 1
    assert shown["levels"][0]["equivariance"] == dict(found.cosine["fine"])
    table = CliRunner().invoke(app, ["inspect", str(tmp_path / "store")]).stdout
    assert "answer to the changed image" in " ".join(table.split())


def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    path = new_store(tmp_path / "store", sources)
    with pytest.raises(NonFiniteFeaturesError, match="while measuring equivariance"):
        run(path, sources, teacher(lambda images: symmetric(images) * torch.nan, 12))
