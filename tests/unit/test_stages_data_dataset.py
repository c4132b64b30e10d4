"""Labels in the published layout, their checks, and the data sets that serve them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.data.config import FolderData, ManifestData, NyudData, ScenesData
from stages.data.dataset import Dataset, open_dataset
from stages.data.images import ImageError
from stages.data.labels import LabelError, label_path
from stages.data.sources import SourceError
from stages.data.tasks import NYUD_TASKS, PASCAL_TASKS, SCENES_TASKS

SIZE = HEIGHT, WIDTH = 6, 8
FOLDERS = {"boundary": "edge"}


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_depth(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def raw_labels() -> dict[str, np.ndarray]:
    """One stored array per task, as the layout wants it."""
    grid = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    normals = np.full((HEIGHT, WIDTH, 3), 127, np.uint8)
    normals[0] = (255, 127, 128)
    normals[1] = (0, 0, 0)
    normals[2] = (128, 128, 0)
    return {
        "segmentation": (grid % 12).astype(np.uint8),
        "boundary": np.where(grid % 8 == 3, 255, 0).astype(np.uint8),
        "normals": normals,
        "depth": (grid / 8).astype(np.float32),
        "saliency": np.where(grid < 20, 255, 0).astype(np.uint8),
        "parts": np.where(grid == 5, 255, grid % 7).astype(np.uint8),
    }


def write_labels(root: Path, image_id: str) -> None:
    for task, array in raw_labels().items():
        path = root / FOLDERS.get(task, task) / f"{image_id}.png"
        if task == "depth":
            write_depth(path.with_suffix(".npy"), array)
        else:
            write_image(path, array)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a layout with images 1 and 2 for training, 3 for validation, and every label."""
    (tmp_path / "gt_sets").mkdir()
    (tmp_path / "gt_sets" / "train.txt").write_text("1\n2\n")
    (tmp_path / "gt_sets" / "val.txt").write_text("3\n")
    for image_id in ("1", "2", "3"):
        write_image(tmp_path / "images" / f"{image_id}.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        write_labels(tmp_path, image_id)
    return tmp_path


@pytest.fixture
def nyud(root: Path) -> Dataset:
    return open_dataset(NyudData(kind="nyud", root=root))


def test_labels_at_the_images_own_size(nyud: Dataset) -> None:
    raw = raw_labels()
    labels = replace(nyud, tasks=SCENES_TASKS).labels("1", SIZE)
    assert list(labels) == [task.name for task in SCENES_TASKS]
    expected = np.where(raw["segmentation"] == 0, 255, raw["segmentation"].astype(int) - 1)
    assert np.array_equal(labels["segmentation"], expected)
    assert np.array_equal(labels["boundary"], raw["boundary"] / 255)
    assert np.array_equal(labels["saliency"], raw["saliency"] // 255)
    assert np.array_equal(labels["parts"], raw["parts"])
    assert np.array_equal(labels["depth"], raw["depth"])
    assert {name: label.dtype for name, label in labels.items()} == {
        "segmentation": np.int64,
        "parts": np.int64,
        "saliency": np.int64,
        "normals": np.float32,
        "boundary": np.float32,
        "depth": np.float32,
    }


def test_normals_are_unit_vectors_or_zero_where_unknown(nyud: Dataset) -> None:
    normals = nyud.labels("1", SIZE)["normals"]
    assert np.allclose(normals[0], (1, 0, 0), atol=0.01)
    assert np.allclose(normals[2], (0, 0, -1), atol=0.01)
    assert np.allclose(np.linalg.norm(normals[[0, 2]], axis=-1), 1)
    assert (normals[[1, 3, 4, 5]] == 0).all()  # black, and grey as in the published files


def test_labels_in_a_view(nyud: Dataset) -> None:
    labels = nyud.labels("1", (3, 3))
    assert {name: label.shape for name, label in labels.items()} == {
        "segmentation": (3, 3),
        "depth": (3, 3),
        "normals": (3, 3, 3),
        "boundary": (3, 3),
    }
    assert np.array_equal(labels["depth"], raw_labels()["depth"][1::2, 2:7:2])
    # 6 x 8 is cut to columns 1..6, then halved: the boundary in column 3 lands in the middle
    assert np.array_equal(labels["boundary"], [[0, 1, 0]] * 3)


def test_labels_follow_an_image_that_exif_turns(root: Path, nyud: Dataset) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "images" / "1.png", exif=exif)
    assert nyud.labels("1", SIZE)["depth"].shape == (HEIGHT, WIDTH)


WRONG = {
    "segmentation": [
        (np.full((HEIGHT, WIDTH), 41, np.uint8), r"classes 1\.\.40, got values up to 41"),
        (np.zeros((HEIGHT, WIDTH, 3), np.uint8), r"one integer per pixel, got uint8 of shape \(6"),
        (np.zeros((WIDTH, HEIGHT), np.uint8), r"is 8 x 6 \(height x width\), its image is 6 x 8"),
    ],
    "boundary": [(np.full((HEIGHT, WIDTH), 1, np.uint8), "only 0 and 255, got 1")],
    "saliency": [(np.arange(48, dtype=np.uint8).reshape(6, 8), r"got 0, 1, 2, 3, 4, 5, \.\.\.")],
    "parts": [(np.full((HEIGHT, WIDTH), 7, np.uint8), r"classes 0\.\.6 and 255 \(ignore\), got 7")],
    "normals": [(np.zeros((HEIGHT, WIDTH), np.uint8), "8-bit RGB image, got uint8")],
    "depth": [
        (np.zeros((HEIGHT, WIDTH), np.uint16), "floats in metres, got uint16"),
        (np.zeros((HEIGHT, WIDTH, 1), np.float32), r"got float32 of shape \(6, 8, 1\)"),
        (np.full((HEIGHT, WIDTH), np.nan, np.float32), "48 values are not finite"),
        (np.full((HEIGHT, WIDTH), 2500.0), r"got 2500 to 2500; is it another unit\?"),
        (np.full((HEIGHT, WIDTH), -1.0), "got -1 to -1"),
        (np.zeros((3, 4), np.float32), r"is 3 x 4 \(height x width\)"),
        (np.zeros(7, np.float32), r"is 7 \(height x width\)"),
        (np.full((HEIGHT, WIDTH), None), "cannot be read"),  # pickled objects are never loaded
    ],
}


@pytest.mark.parametrize(
    ("task", "array", "message"),
    [(task, array, message) for task, cases in WRONG.items() for array, message in cases],
)
def test_wrong_values_and_sizes(
    root: Path, nyud: Dataset, task: str, array: np.ndarray, message: str
) -> None:
    path = label_path(root, task, "2")
    (write_depth if task == "depth" else write_image)(path, array)
    tasks = tuple(known for known in (*NYUD_TASKS, *PASCAL_TASKS[1:3]) if known.name == task)
    with pytest.raises(LabelError, match=message) as caught:
        replace(nyud, tasks=tasks).labels("2", SIZE)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_missing_and_damaged_labels(root: Path, nyud: Dataset, task: str) -> None:
    path = label_path(root, task, "1")
    whole = path.read_bytes()
    for content in (b"", whole[:-30], b"PK\x03\x04 no archive", b"text"):
        path.write_bytes(content)
        with pytest.raises(LabelError, match="cannot be read"):
            nyud.labels("1", SIZE)
    path.unlink()
    with pytest.raises(LabelError, match=rf"{path.name} is missing"):
        nyud.labels("1", SIZE)


def test_check_labels_reports_all_mistakes_at_once(root: Path, nyud: Dataset) -> None:
    nyud.check_labels("train")
    nyud.check_labels("val")
    label_path(root, "depth", "1").unlink()
    label_path(root, "normals", "2").write_bytes(b"")
    write_image(label_path(root, "segmentation", "2"), np.zeros((5, 5), np.uint8))
    with pytest.raises(LabelError) as caught:
        nyud.check_labels("train")
    message = str(caught.value)
    assert "split 'train'" in message
    assert "3 wrong labels" in message
    for part in ("1.npy is missing", "normals/2.png cannot be read", "2.png is 5 x 5"):
        assert part in message
    nyud.check_labels("val")


def test_check_labels_shows_ten_and_counts_the_rest(root: Path, nyud: Dataset) -> None:
    for task in (*NYUD_TASKS, *PASCAL_TASKS):
        for image_id in ("1", "2"):
            label_path(root, task.name, image_id).unlink(missing_ok=True)
    with pytest.raises(LabelError, match="12 wrong labels") as caught:
        replace(nyud, tasks=SCENES_TASKS).check_labels("train")
    assert str(caught.value).count("is missing") == 10
    assert "and 2 more" in str(caught.value)


def test_a_bad_image_is_left_to_the_index(root: Path, nyud: Dataset) -> None:
    nyud.path("1").write_bytes(b"")
    nyud.check_labels("train")
    with pytest.raises(ImageError):
        nyud.labels("1", SIZE)


def test_unknown_names(nyud: Dataset) -> None:
    with pytest.raises(SourceError, match="no split 'test'; the data set has train, val"):
        nyud.check_labels("test")
    with pytest.raises(SourceError, match="no image has the id '9'"):
        nyud.labels("9", SIZE)
    with pytest.raises(LabelError, match="no labels for parts; it has: segmentation, depth"):
        nyud.with_tasks(["depth", "parts"])
    assert [task.name for task in nyud.with_tasks(["boundary", "depth"]).tasks] == [
        "boundary",
        "depth",
    ]


def test_unlabelled_images(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_image(tmp_path / f"{name}.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "list.csv").write_text("path\nb.png\na.png\n")
    folder = open_dataset(FolderData(kind="folder", root=tmp_path))
    manifest = open_dataset(ManifestData(kind="manifest", path=tmp_path / "list.csv"))
    assert folder.splits == {"train": ("a", "b")}
    assert manifest.splits == {"train": ("b", "a")}
    assert folder.labels("a", (2, 2)) == {}
    folder.check_labels("train")


def test_scenes_are_read_and_their_number_is_checked(root: Path) -> None:
    scenes = open_dataset(ScenesData(kind="scenes", root=root, train=2, val=1))
    assert [task.name for task in scenes.tasks] == [task.name for task in SCENES_TASKS]
    with pytest.raises(SourceError, match=r"holds 2 \+ 1 scenes .* asks for 3 \+ 1"):
        open_dataset(ScenesData(kind="scenes", root=root, train=3, val=1))
    with pytest.raises(SourceError, match="have to be rendered first"):
        open_dataset(ScenesData(kind="scenes", root=root / "none", train=2, val=1))
