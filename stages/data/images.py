"""Reading single images, and indexing many with the bad ones set aside."""

import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from stages.data.places import Place, UnreadableError, open_file, patiently, read_bytes
from stages.data.sources import ImageSource
from stages.progress import Progress
from store.images import OK, ImageTable

__all__ = [
    "OK",
    "ImageError",
    "ImageFile",
    "ImageOutOfReachError",
    "TooManyBadImagesError",
    "decode_image",
    "index_images",
    "read_image",
    "read_size",
    "try_images",
]

_SHOWN = 5
_BATCH = 256  # images in flight, so that a set of millions needs no million futures
_REMOTE_AT_ONCE = 16  # images that are fetched take longer to come than to decode
# What Pillow's readers raise on damaged files, found by corrupting files of each format.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """One image cannot be used; `reason` is short and names no path.

    `sha256` is of the file's bytes, "" where they could not be read.
    """

    def __init__(self, message: str, reason: str = "", sha256: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message
        self.sha256 = sha256


class ImageOutOfReachError(ImageError):
    """An image could not be fetched, though it was tried again and again; it may be later."""


class TooManyBadImagesError(ValueError):
    """More images are unreadable than the configuration allows."""


class _UnusableError(ValueError):
    """Our own objection to an image that Pillow would have read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """A decoded image and the SHA-256 of the very bytes it was decoded from."""

    pixels: npt.NDArray[np.uint8]
    """H x W x 3, RGB."""
    sha256: str


def read_image(path: Place) -> ImageFile:
    """Read an image once and decode it to H x W x 3 uint8 RGB, upright according to its EXIF tag.

    Transparent images are laid on white, 16-bit grey is divided by 257, of an animation the
    first frame is taken, and CMYK is converted without regard to colour profiles.

    Raises:
        ImageError: the file is missing, no regular file, empty, no image, damaged, of a pixel
            type without a known range, or larger than Pillow's limit against decompression bombs.
        ImageOutOfReachError: it cannot be fetched now.
    """
    return decode_data(path, read_data(path))


def read_data(path: Place) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ImageError, ImageOutOfReachError: as `read_image`.
    """
    try:
        return read_bytes(path)
    except UnreadableError as error:
        kind = ImageOutOfReachError if error.passing else ImageError
        raise kind(f"{path}: {error}", str(error)) from error


def decode_data(path: Place, data: bytes) -> ImageFile:
    """Decode the bytes of an image file, which was read from `path`.

    Raises:
        ImageError: as `read_image`.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return ImageFile(pixels=_decode(data), sha256=sha256)
    except _DECODE_ERRORS as error:
        reason = _reason(error)
        raise ImageError(f"{path}: {reason}", reason, sha256) from error


def decode_image(path: Place) -> npt.NDArray[np.uint8]:
    """Return the pixels of `read_image`: H x W x 3 uint8 RGB.

    Raises:
        ImageError: as `read_image`.
    """
    return read_image(path).pixels


def read_size(path: Place) -> tuple[int, int]:
    """Return (height, width) in pixels as `read_image` would give it, from the header alone.

    Raises:
        ImageError: the header cannot be read.
    """
    try:
        with _opened(path) as file, Image.open(file) as image:
            width, height = image.size
            # of a TIFF, Pillow gives the upright size itself
            sideways = _orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"
    except _DECODE_ERRORS as error:
        reason = _reason(error)
        raise ImageError(f"{path}: {reason}", reason) from error
    return (width, height) if sideways else (height, width)


def _opened(place: Place) -> io.BufferedReader | io.BytesIO:
    if isinstance(place, Path):
        return patiently(lambda: open_file(place))
    return io.BytesIO(read_bytes(place))


def index_images(
    sources: Sequence[ImageSource], max_bad: float, progress: Progress, workers: int | None = None
) -> ImageTable:
    """Decode every image once and tabulate size, content hash and status, in the given order.

    An image that cannot be decoded keeps its row, with its reason as status, 0 x 0 pixels and
    the hash of its bytes if they could be read. ceil(max_bad * images) of them are tolerated, so
    any share above zero forgives at least one image; reading stops soon after there are more.
    `workers` threads share the work.

    Raises:
        TooManyBadImagesError: more are unreadable than `max_bad` allows, or all of them.
    """
    most = _limit(max_bad, len(sources))
    rows = _read_rows(sources, most + _SHOWN, progress, workers)
    _check_bad(sources, rows, max_bad)
    return _table(sources, rows)


def try_images(sources: Sequence[ImageSource], progress: Progress) -> ImageTable:
    """Tabulate images as `index_images` does, however many of them cannot be read."""
    return _table(sources, _read_rows(sources, len(sources), progress, None))


def _read_rows(
    sources: Sequence[ImageSource], most_bad: int, progress: Progress, workers: int | None
) -> "list[_Row]":
    """Return a row per image, in order; those up to where there are more bad ones than `most_bad`."""
    progress.start("index images", len(sources))
    rows: list[_Row] = []
    bad = 0
    with ThreadPoolExecutor(workers or _threads(sources)) as pool:
        for start in range(0, len(sources), _BATCH):
            for row in pool.map(_index_one, sources[start : start + _BATCH]):
                rows.append(row)
                progress.advance()
                bad += row.status != OK
                if bad > most_bad:
                    pool.shutdown(cancel_futures=True)
                    return rows
    return rows


def _table(sources: Sequence[ImageSource], rows: "Sequence[_Row]") -> ImageTable:
    return ImageTable(
        ids=tuple(source.id for source in sources),
        sha256=tuple(row.sha256 for row in rows),
        heights=tuple(row.height for row in rows),
        widths=tuple(row.width for row in rows),
        statuses=tuple(row.status for row in rows),
    )


def _limit(max_bad: float, images: int) -> int:
    return math.ceil(max_bad * images - 1e-9)  # 0.07 * 100 is a little more than 7


def _threads(sources: Sequence[ImageSource]) -> int | None:
    local = all(isinstance(source.path, Path) for source in sources)
    return os.cpu_count() if local else _REMOTE_AT_ONCE


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    height: int = 0
    width: int = 0
    sha256: str
    status: str


def _index_one(source: ImageSource) -> _Row:
    try:
        image = read_image(source.path)
    except ImageError as error:
        return _Row(sha256=error.sha256, status=error.reason)
    height, width, _ = image.pixels.shape
    return _Row(height=height, width=width, sha256=image.sha256, status=OK)


def _check_bad(sources: Sequence[ImageSource], rows: Sequence[_Row], max_bad: float) -> None:
    bad = [
        (source.path, row.status)
        for source, row in zip(sources, rows, strict=False)
        if row.status != OK
    ]
    limit = _limit(max_bad, len(sources))
    if not bad or (len(bad) <= limit and len(bad) < len(rows)):
        return
    seen = f"{len(rows)}" if len(rows) == len(sources) else f"the first {len(rows)}"
    shown = "".join(f"\n  {path}: {reason}" for path, reason in bad[:_SHOWN])
    more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise TooManyBadImagesError(
        f"{len(bad)} of {seen} images cannot be used, max_bad = {max_bad:g} allows {limit}"
        f"{' (and never all)' if len(bad) == len(rows) else ''}:{shown}{more}\n"
        "Nothing was written. Repair or remove these files, or raise max_bad (--max-bad)."
    )


def _reason(error: BaseException) -> str:
    """Short text without addresses or paths, so that the same file always gives the same."""
    if isinstance(error, _UnusableError | UnreadableError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"larger than Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"truncated or corrupt: {str(error)[:100] or type(error).__name__}"


def _decode(data: bytes) -> npt.NDArray[np.uint8]:
    if not data:
        raise _UnusableError("empty file (0 bytes)")
    with Image.open(io.BytesIO(data)) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            # up to twice the limit Pillow itself only warns
            raise Image.DecompressionBombError
        image.load()
        return np.array(_to_rgb(_upright(image)))  # asarray would be read-only


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also writes the EXIF data anew, and fails on harmless odd tags
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        # the PNG reader's own getexif would decode all pixels in search of a trailing chunk
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS as error:
        raise _UnusableError("corrupt EXIF data, so that its orientation is unknown") from error
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise _UnusableError("floating-point pixels have no known range; convert to 8 or 16 bit")
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bit_grey(image)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit_grey(image: Image.Image) -> npt.NDArray[np.uint8]:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise _UnusableError("integer pixels outside 0..65535; convert to 8 or 16 bit")
    return ((values + 128) // 257).astype(np.uint8)
