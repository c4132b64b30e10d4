"""A folder of hostile images, as `sak index` and `sak extract-teachers` meet it."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.errors import StepError
from pipeline.indexing import bad_share
from pipeline.testing import sak, sak_json
from store.reader import FeatureStore

RANDOM = [np.random.default_rng(0)]


def pixels(*shape: int, top: int = 256) -> np.ndarray:
    return RANDOM[0].integers(0, top, shape or (40, 50, 3)).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    given = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    given.save(file, kind, **options)
    return file.getvalue()


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(pixels()) for _ in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return encoded(pixels(), "JPEG", exif=exif)


def talkative() -> bytes:
    text = PngInfo()
    text.add_text("comment", "x" * 900_000)
    return encoded(pixels(), pnginfo=text, icc_profile=bytes(500_000))


def zip_bomb_text() -> bytes:
    text = PngInfo()
    text.add_text("comment", "x" * 5_000_000, zip=True)
    return encoded(pixels(), pnginfo=text)


def bomb(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + checksum + b"\0\0\0\x64IDAT"


def wrong_checksum() -> bytes:
    content = bytearray(encoded(pixels()))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


GOOD: dict[str, Callable[[], bytes]] = {
    "plain.jpg": lambda: encoded(pixels(), "JPEG"),
    "wrong_extension.jpg": lambda: encoded(pixels()),
    "one_pixel.png": lambda: encoded(pixels(1, 1, 3)),
    "wide.png": lambda: encoded(pixels(2, 20_000, 3)),
    "tall.jpg": lambda: encoded(pixels(20_000, 3, 3), "JPEG"),
    "animated_gif.gif": lambda: animation("GIF"),
    "animated_webp.webp": lambda: animation("WEBP"),
    "animated_png.png": lambda: animation("PNG"),
    "cmyk.jpg": lambda: encoded(Image.fromarray(pixels()).convert("CMYK"), "JPEG"),
    "sixteen_bit.png": lambda: encoded(pixels(40, 50).astype(np.uint16) * 257),
    "rotated.jpg": rotated,
    "palette.png": lambda: encoded(Image.fromarray(pixels()).quantize(16), transparency=3),
    "palette_alpha.png": lambda: encoded(
        Image.fromarray(pixels()).quantize(16), transparency=bytes(range(16))
    ),
    "grey_alpha.png": lambda: encoded(Image.fromarray(pixels(40, 50, 2), "LA")),
    "one_bit.png": lambda: encoded(Image.fromarray(pixels(40, 50)).convert("1")),
    "huge_metadata.png": talkative,
    "lab.tif": lambda: encoded(Image.fromarray(pixels(), "LAB"), "TIFF"),
    "progressive.jpg": lambda: encoded(pixels(), "JPEG", progressive=True),
}
BAD: dict[str, tuple[Callable[[], bytes] | None, str]] = {
    "truncated_jpg.jpg": (lambda: encoded(pixels(), "JPEG")[:600], "truncated or corrupt"),
    "truncated_png.png": (lambda: encoded(pixels())[:3000], "truncated or corrupt"),
    "header_only.png": (lambda: encoded(pixels())[:40], "not an image that Pillow"),
    "wrong_checksum.png": (wrong_checksum, "truncated or corrupt"),
    "bomb.png": (lambda: bomb(60_000, 60_000), "larger than Pillow's limit"),
    "text_bomb.png": (zip_bomb_text, "truncated or corrupt"),
    "empty.jpg": (lambda: b"", "empty file (0 bytes)"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html>404</html>", "not an image that Pillow knows"),
    "drawing.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that"),
    "phone.jpg": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "not an image that"),
    "program.gif": (lambda: b"\x7fELF" + bytes(500), "not an image that Pillow knows"),
    "float.tif": (lambda: encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
                  "floating-point pixels have no known range"),
    "dangling.png": (None, "cannot be read: No such file or directory"),
    "pipe.png": (None, "not a regular file"),
    "forbidden.png": (None, "cannot be read: Permission denied"),
    "huge.png": (None, "more than 512 MiB"),
}  # fmt: skip


def fill(folder: Path, with_bad: bool) -> None:
    RANDOM[0] = np.random.default_rng(0)
    folder.mkdir()
    for name, make in GOOD.items():
        (folder / name).write_bytes(make())
    if not with_bad:
        return
    for name, (content, _) in BAD.items():
        if content is not None:
            (folder / name).write_bytes(content())
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "forbidden.png").write_bytes(encoded(pixels()))
    with (folder / "huge.png").open("wb") as file:
        file.truncate(2**30)
    (folder / "folder.jpg").mkdir()  # no image, and nothing in it


@pytest.fixture(autouse=True)
def _forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read anything, so permissions are taken away here."""
    real = os.open

    def guarded(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if os.fspath(path).endswith("forbidden.png") and not Path(path).stat().st_mode & 0o400:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", guarded)


def named_params(tiny_params: Path, tmp_path: Path, name: str) -> Path:
    values = yaml.safe_load(tiny_params.read_text())
    values |= {"data": {"kind": "folder", "root": str(tmp_path / name)}, "tasks": []}
    values |= {"store": str(tmp_path / f"{name}.zarr"), "extract": {"batch_size": 1}}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def hostile(tiny_params: Path, tmp_path: Path) -> Path:
    fill(tmp_path / "hostile", with_bad=True)
    (tmp_path / "hostile" / "forbidden.png").chmod(0)
    return named_params(tiny_params, tmp_path, "hostile")


REASONS = {Path(name).stem: reason for name, (_, reason) in BAD.items()}
GOOD_IDS = sorted(Path(name).stem for name in GOOD)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_hostile_images_are_quarantined_and_the_others_are_as_without_them(
    hostile: Path, tiny_params: Path, tmp_path: Path
) -> None:
    assert len(GOOD) + len(BAD) > 30
    refused = sak("index", "--params", hostile, code=2)
    assert "max_bad = 0.001 allows 1" in refused
    assert "Nothing was written" in refused
    assert not (tmp_path / "hostile.zarr").exists()
    assert "allows 4" in sak("index", "--max-bad", "4", "--params", hostile, code=2)
    found = sak_json("index", "--max-bad", str(len(BAD)), "--params", hostile)
    assert found["quarantined"].keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert found["quarantined"][name].startswith(reason), name
    (extracted,) = sak_json("extract-teachers", "first", "--params", hostile)["teachers"]
    assert (extracted["images"], extracted["quarantined"]) == (len(GOOD), len(BAD))
    listed = sak_json("inspect", tmp_path / "hostile.zarr", "--quarantined")
    assert listed["quarantined"] == found["quarantined"]

    fill(tmp_path / "clean", with_bad=False)
    clean = named_params(tiny_params, tmp_path, "clean")
    sak("index", "--params", clean)
    sak("extract-teachers", "first", "--params", clean)
    one, other = (FeatureStore(tmp_path / f"{name}.zarr") for name in ("hostile", "clean"))
    assert list(other.images.ids) == GOOD_IDS
    rows = np.flatnonzero(one.valid("first"))
    assert [one.images.ids[row] for row in rows] == GOOD_IDS
    for level in one.levels("first"):
        expected = other.read("first", level, range(len(GOOD)))
        np.testing.assert_array_equal(one.read("first", level, rows), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mended_images_are_let_in_and_computed_for_every_teacher(
    hostile: Path, tmp_path: Path
) -> None:
    options = ("--params", hostile)
    advice = f"run `sak index --params {hostile}` first"
    assert advice in sak("index", "--retry-quarantined", *options, code=2)
    sak("index", "--max-bad", "60%", *options)
    assert sak_json("index", "--retry-quarantined", *options)["admitted"] == []
    sak("extract-teachers", "first", *options)
    store = tmp_path / "hostile.zarr"
    before = FeatureStore(store)
    rows = np.flatnonzero(before.valid("first"))
    kept = before.read("first", "block_03", rows)

    (tmp_path / "hostile" / "forbidden.png").chmod(0o600)
    (tmp_path / "hostile" / "empty.jpg").write_bytes(encoded(pixels(), "JPEG"))
    (tmp_path / "hostile" / "page.jpg").write_bytes(b"<html>another page</html>")
    for command in (("index", "--max-bad", "60%"), ("index", "--append", "--max-bad", "60%")):
        refused = sak(*command, *options, code=2)
        assert "2 quarantined images can be read now, such as 'empty'" in refused
        assert f"`sak index --retry-quarantined --params {hostile}` lets them in" in refused
    result = sak_json("index", "--retry-quarantined", *options)
    assert result["admitted"] == ["empty", "forbidden"]
    assert len(result["quarantined"]) == len(BAD) - 2
    sak("index", "--max-bad", "60%", *options)  # other reasons of bad images are no change
    assert "`sak extract-teachers first` computes what is missing" in sak("verify", store)
    assert "Run `sak extract-teachers" in sak("train-student", "distill", *options, code=2)
    for done in sak_json("extract-teachers", *options)["teachers"]:
        assert (done["images"], done["quarantined"]) == (len(GOOD) + 2, len(BAD) - 2)
    after = FeatureStore(store)
    for teacher in ("first", "second"):
        assert after.valid(teacher).sum() == len(GOOD) + 2
        assert after.valid(teacher)[[after.row("empty"), after.row("forbidden")]].all()
    np.testing.assert_array_equal(after.read("first", "block_03", rows), kept)
    assert sak("verify", store)
    (again, _) = sak_json("extract-teachers", *options)["teachers"]
    assert again["images"] == 0


def test_flags_that_do_not_go_together(hostile: Path) -> None:
    for other in (("--append",), ("--max-bad", "3")):
        refused = sak("index", "--retry-quarantined", *other, "--params", hostile, code=2)
        assert "goes alone" in refused


@pytest.mark.parametrize(
    ("text", "share"), [("30", 0.3), ("0", 0), ("500", 1), ("0.1%", 0.001), ("0.25", 0.25)]
)
def test_bad_share(text: str, share: float) -> None:
    assert bad_share(text, 100) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "-1", "101%", "1.5", "many", "nan", "%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(StepError, match="a number of images such as 30, or a share"):
        bad_share(text, 100)
