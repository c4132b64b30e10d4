"""Listing the images of a folder, a manifest or a labelled data set, each with a stable id."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING

from stages.data.places import (
    Address,
    Place,
    UnreadableError,
    Url,
    address,
    files_of,
    patiently,
)

if TYPE_CHECKING:
    import pandas as pd  # a second of its own; only manifests need it

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
SPLITS = ("train", "val")
_SHOWN = 10


class SourceError(ValueError):
    """The list of images cannot be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """One image: the id that joins everything, and where its bytes are."""

    id: str
    path: Place


def list_folder(root: Address) -> tuple[ImageSource, ...]:
    """List every image file below `root`, links followed, hidden names skipped, ordered by id.

    The id is the path relative to `root` without its suffix, with forward slashes.

    Raises:
        SourceError: no such folder, a link in it that leads back to itself, no image in it, or two
            files with the same id.
    """
    names = _remote_names(root) if isinstance(root, Url) else _local_names(root)
    found = [
        ImageSource(id=_id_of(name), path=root / str(name))
        for name in names
        if name.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not found:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError(f"{root} holds no image; files are recognised by their suffix: {known}")
    check_ids(found)
    return tuple(sorted(found, key=lambda source: source.id))


def list_manifest(path: Path, root: Address | None = None) -> tuple[ImageSource, ...]:
    """List the images of a CSV or Parquet table of paths and URLs, in the order of its rows.

    Relative paths start from `root`, or else from the manifest's folder. Without a column `id`
    the id is the path as written, without suffix; of a URL without protocol, password and query.
    Whether a file exists shows when it is read.

    Raises:
        SourceError: the table cannot be read, is empty, lacks the column `path`, has an empty
            cell, or names a path or an id twice.
    """
    table = _read_table(path)
    if "path" not in table.columns:
        columns = ", ".join(map(str, table.columns)) or "none"
        raise SourceError(f"{path} needs a column 'path', its columns are: {columns}")
    if table.empty:
        raise SourceError(f"{path} lists no image")
    paths = _cells(path, table, "path")
    base = path.parent if root is None else root
    places = [_below(base, entry) for entry in paths]
    ids = _cells(path, table, "id") if "id" in table.columns else _ids_from(paths, places, base)
    sources = [ImageSource(id=name, path=place) for name, place in zip(ids, places, strict=True)]
    _check_paths(path, sources)
    check_ids(sources)
    return tuple(sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The images of a labelled data set, training before validation."""

    sources: tuple[ImageSource, ...]
    splits: Mapping[str, tuple[str, ...]]


def list_layout(root: Path) -> Layout:
    """List a labelled data set: ids from `gt_sets/{train,val}.txt`, `images/ID.png` or `.jpg`.

    Raises:
        SourceError: a list is missing, empty or repeats an id, the two share one, or images are
            missing (ten are named) or present in both formats.
    """
    splits = {split: _read_ids(root, split) for split in SPLITS}
    shared = sorted(set(splits["train"]) & set(splits["val"]))
    if shared:
        raise SourceError(
            f"{root / 'gt_sets'}: train.txt and val.txt share {len(shared)} ids"
            f" ({_first(shared)}); an image must not be both trained and evaluated on"
        )
    ids = [name for split in SPLITS for name in splits[split]]
    candidates = {
        name: [path for path in _layout_images(root, name) if path.is_file()] for name in ids
    }
    missing = [name for name, paths in candidates.items() if not paths]
    if missing:
        raise SourceError(
            f"{root / 'images'} lacks {len(missing)} of {len(ids)} listed images"
            f" (ID.png or ID.jpg): {_first(missing)}"
        )
    sources = [ImageSource(id=name, path=path) for name in ids for path in candidates[name]]
    check_ids(sources)
    return Layout(sources=tuple(sources), splits=splits)


def _walk(root: Path) -> Iterable[Path]:
    def fail(error: OSError) -> None:
        raise SourceError(f"{error.filename} cannot be listed: {error.strerror}") from error

    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:
            _refuse_loop(Path(folder, name))
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _refuse_loop(folder: Path) -> None:
    if folder.is_symlink() and folder.parent.resolve().is_relative_to(target := folder.resolve()):
        raise SourceError(f"{folder} is a link back to {target}, without end; remove the link")


def _local_names(root: Path) -> Iterable[PurePath]:
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder; give the folder that holds the images")
    return (path.relative_to(root) for path in _walk(root))


def _remote_names(root: Url) -> list[PurePath]:
    def look() -> list[PurePath]:
        files, top = files_of(root)
        files.invalidate_cache()
        names = [PurePosixPath(name) for name in files.find(top)]
        return [name.relative_to(top) for name in names]

    if root.address.startswith("http"):
        raise SourceError(f"{root} cannot be listed as a folder; name the images in a manifest")
    try:
        names = patiently(look)
    except UnreadableError as error:
        raise SourceError(f"{root} cannot be listed: {error}") from error
    return [name for name in names if not any(part.startswith(".") for part in name.parts)]


def _id_of(relative: PurePath) -> str:
    return relative.with_suffix("").as_posix()


def _below(base: Address, entry: str) -> Address:
    return address(entry) if "://" in entry else base / entry


def _ids_from(paths: list[str], places: list[Address], base: Address) -> list[str]:
    return [_id_from(path, place, base) for path, place in zip(paths, places, strict=True)]


def _id_from(path: str, place: Address, base: Address) -> str:
    if isinstance(place, Url):
        name = str(place).removeprefix(f"{base}/")
        return _id_of(PurePosixPath(name.rpartition("://")[2]))
    entry = Path(path)
    inside = isinstance(base, Path) and entry.is_relative_to(base)
    return _id_of(entry.relative_to(str(base)) if inside else entry)


def _read_table(path: Path) -> "pd.DataFrame":
    import pandas as pd

    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise SourceError(f"{path}: a manifest is a .csv or .parquet file")
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as a table: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas took the surplus for row names
        raise SourceError(f"{path} has more cells in a row than in its header; quote the commas")
    return table


def _cells(path: Path, table: "pd.DataFrame", column: str) -> list[str]:
    empty = table[column].isna() | (table[column].astype(str).str.strip() == "")
    if empty.any():
        row = int(empty.to_numpy().argmax()) + 1
        raise SourceError(
            f"{path}: column '{column}' is empty in {int(empty.sum())} rows, first in row {row}"
        )
    return [str(cell) for cell in table[column]]


def _check_paths(manifest: Path, sources: Iterable[ImageSource]) -> None:
    seen: set[Place] = set()
    for source in sources:
        if source.path in seen:
            raise SourceError(f"{manifest} lists {source.path} twice")
        seen.add(source.path)


def check_ids(sources: Iterable[ImageSource]) -> None:
    """Refuse two images with one id, and an id that is no valid text.

    Raises:
        SourceError: naming them.
    """
    seen: dict[str, Place] = {}
    for source in sources:
        if source.id in seen:
            raise SourceError(
                f"{seen[source.id]} and {source.path} have the same id '{source.id}'; remove or"
                " rename one of them"
            )
        try:
            source.id.encode()
        except UnicodeEncodeError as error:
            raise SourceError(f"{str(source.path)!r}: the file name is not valid UTF-8") from error
        seen[source.id] = source.path


def _layout_images(root: Path, name: str) -> tuple[Path, Path]:
    return root / "images" / f"{name}.png", root / "images" / f"{name}.jpg"


def _read_ids(root: Path, split: str) -> tuple[str, ...]:
    path = root / "gt_sets" / f"{split}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} cannot be read ({error}); the layout needs one image id per line there"
        ) from error
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise SourceError(f"{path} lists no image")
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise SourceError(f"{path} repeats {len(repeated)} ids: {_first(repeated)}")
    return tuple(ids)


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
