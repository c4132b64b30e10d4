"""Decoding one image of every awkward kind, and indexing many."""

import hashlib
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.data.images import (
    ImageError,
    TooManyBadImagesError,
    decode_image,
    index_images,
    read_image,
    read_size,
)
from stages.data.sources import ImageSource
from stages.progress import NoProgress

ROWS, COLUMNS = 20, 30


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def huge_png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + checksum + b"\0\0\0\x64IDAT"


def test_rgb_is_unchanged_writable_and_hashed_from_the_same_bytes(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    path = save(tmp_path / "a.png", pixels)
    image = read_image(path)
    assert np.array_equal(image.pixels, pixels)
    assert image.pixels.flags.writeable
    assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_exif_orientation_is_applied_and_the_header_agrees(
    tmp_path: Path, pixels: np.ndarray, orientation: int, suffix: str
) -> None:
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels),  # shown after a quarter turn clockwise
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif, **options)
    assert np.array_equal(decode_image(path), pixels)
    assert read_size(path) == (ROWS, COLUMNS)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 128, 129], [65535, 32896, 65278, 40000]], dtype=np.uint16)
    decoded = decode_image(save(tmp_path / "a.png", grey))
    expected = np.array([[0, 1, 0, 1], [255, 128, 254, 156]])
    assert np.array_equal(decoded, np.stack([expected] * 3, axis=-1))


def test_cmyk(tmp_path: Path) -> None:
    ink = np.zeros((ROWS, COLUMNS, 4), dtype=np.uint8)
    ink[..., 0] = 255  # cyan
    path = tmp_path / "a.jpg"
    Image.fromarray(ink, "CMYK").save(path, quality=100)
    assert np.abs(decode_image(path).astype(int) - (0, 255, 255)).max() <= 2


def test_one_bit_and_grey(tmp_path: Path) -> None:
    black_and_white = np.tile([True, False], (ROWS, COLUMNS // 2))
    expected = np.stack([black_and_white * np.uint8(255)] * 3, axis=-1)
    assert np.array_equal(decode_image(save(tmp_path / "a.png", black_and_white)), expected)
    assert np.array_equal(decode_image(save(tmp_path / "b.png", expected[..., 0])), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (3, 1), 0)
    for column, alpha in enumerate((0, 51, 255)):
        image.putpixel((column, 0), (100,) * (len(mode) - 1) + (alpha,))
    image.save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png")[0, :, 0].tolist() == [255, 224, 100]


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert decode_image(tmp_path / "opaque.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert decode_image(tmp_path / "clear.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (decode_image(tmp_path / "a.gif") == (255, 0, 0)).all()


def test_bad_files_give_short_reasons_without_paths(tmp_path: Path, pixels: np.ndarray) -> None:
    whole = save(tmp_path / "whole.png", pixels).read_bytes()
    jpeg = save(tmp_path / "whole.jpg", pixels).read_bytes()
    files = {
        "empty": b"",
        "text": b"this is no image\n" * 20,
        "png": whole[: len(whole) // 2],
        "jpg": jpeg[: len(jpeg) // 2],
        "bomb": huge_png(60_000, 60_000),
        "large": huge_png(10_000, 10_000),  # where Pillow alone would only warn
    }
    reasons = {}
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert caught.value.sha256 == hashlib.sha256(content).hexdigest()
        reasons[name] = caught.value.reason
        assert str(caught.value) == f"{path}: {reasons[name]}"
        assert "0x" not in reasons[name]
    assert reasons["empty"] == "empty file (0 bytes)"
    assert reasons["text"] == "not an image that Pillow knows"
    assert reasons["png"].startswith("truncated or corrupt")
    assert reasons["jpg"].startswith("truncated or corrupt")
    assert reasons["bomb"] == reasons["large"] == "larger than Pillow's limit of 89478485 pixels"


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_the_size_limit_does_not_depend_on_the_warning_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray
) -> None:
    path = save(tmp_path / "a.png", pixels)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels.size // 3 - 1)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match="limit"):
        read_image(path)


def test_missing_files_and_folders_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(path)
        assert caught.value.sha256 == ""


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    for name, array in {
        "float.tif": np.zeros((2, 2), np.float32),
        "wide.tif": np.full((2, 2), 70_000, np.int32),
    }.items():
        with pytest.raises(ImageError, match="convert to 8 or 16 bit"):
            decode_image(save(tmp_path / name, array))


def test_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.png: empty", "empty", "00")))
    assert (str(error), error.reason, error.sha256) == ("a.png: empty", "empty", "00")


class Counting(NoProgress):
    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, label: str, total: int) -> None:
        self.total = total

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


def make_sources(folder: Path, pixels: np.ndarray, good: int, bad: int) -> list[ImageSource]:
    paths = [save(folder / f"good{index}.png", pixels[: index + 1]) for index in range(good)]
    for index in range(bad):
        paths.insert(good and 1, folder / f"bad{index}.png")
        paths[good and 1].write_bytes(b"")
    return [ImageSource(id=path.stem, path=path) for path in paths]


def test_index_keeps_order_and_quarantines(tmp_path: Path, pixels: np.ndarray) -> None:
    sources = make_sources(tmp_path, pixels, good=4, bad=1)
    progress = Counting()
    table = index_images(sources, 0.001, progress, workers=3)  # 0.1 % of 5 still allows one
    assert table.ids == ("good0", "bad0", "good1", "good2", "good3")
    assert table.statuses == ("ok", "empty file (0 bytes)", "ok", "ok", "ok")
    assert table.heights == (1, 0, 2, 3, 4)
    assert table.widths == (30, 0, 30, 30, 30)
    assert table.sha256 == tuple(
        hashlib.sha256(source.path.read_bytes()).hexdigest() for source in sources
    )
    assert (progress.total, progress.done) == (5, 5)


def test_index_refuses_more_bad_images_than_allowed(tmp_path: Path, pixels: np.ndarray) -> None:
    sources = make_sources(tmp_path, pixels, good=12, bad=8)
    with pytest.raises(TooManyBadImagesError) as caught:
        index_images(sources, 0.35, NoProgress())
    message = str(caught.value)
    assert "8 of 20 images" in message
    assert "allows 7" in message
    assert message.count("empty file") == 5
    assert "and 3 more" in message
    assert index_images(sources, 0.4, NoProgress()).statuses.count("ok") == 12


def test_index_refuses_any_bad_image_at_zero_and_all_bad_always(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    with pytest.raises(TooManyBadImagesError, match="1 of 4"):
        index_images(make_sources(tmp_path, pixels, good=3, bad=1), 0.0, NoProgress())
    with pytest.raises(TooManyBadImagesError, match="never all"):
        index_images(make_sources(tmp_path, pixels, good=0, bad=1), 1.0, NoProgress())
