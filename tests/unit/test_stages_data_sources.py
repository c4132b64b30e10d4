"""Listing folders, manifests and labelled layouts, and what is refused."""

import os
from pathlib import Path

import pandas as pd
import pytest

from stages.data.sources import SourceError, list_folder, list_layout, list_manifest


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folder_ids_order_and_what_is_skipped(tmp_path: Path) -> None:
    touch(tmp_path / "b.JPG", tmp_path / "a" / "z.v2.png", tmp_path / "a.webp")
    touch(tmp_path / ".hidden.png", tmp_path / ".cache" / "c.png", tmp_path / "notes.txt")
    sources = list_folder(tmp_path)
    assert [source.id for source in sources] == ["a", "a/z.v2", "b"]
    assert sources[1].path == tmp_path / "a" / "z.v2.png"


def test_folder_follows_links(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [source.id for source in list_folder(tmp_path / "root")] == ["linked/x"]


def test_folder_refuses_two_files_with_one_id(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "a.jpg")
    with pytest.raises(SourceError, match="same id 'a'") as caught:
        list_folder(tmp_path)
    assert str(tmp_path / "a.png") in str(caught.value)
    assert str(tmp_path / "a.jpg") in str(caught.value)


def test_folder_that_is_empty_missing_or_a_file(tmp_path: Path) -> None:
    touch(tmp_path / "notes.txt")
    with pytest.raises(SourceError, match=r"holds no image.*\.webp"):
        list_folder(tmp_path)
    for path in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(SourceError, match="is not a folder"):
            list_folder(path)


def test_folder_refuses_names_the_store_could_not_hold(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    with pytest.raises(SourceError, match="not valid UTF-8"):
        list_folder(tmp_path)


def test_csv_manifest_keeps_order_and_takes_text_as_written(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text(
        f'path,id,note\n0002.png,007,x\n"sub/a,b.jpg",NA,y\n{tmp_path}/c.png,1.0,\n'
    )
    sources = list_manifest(manifest)
    assert [(source.id, source.path) for source in sources] == [
        ("007", tmp_path / "0002.png"),
        ("NA", tmp_path / "sub" / "a,b.jpg"),
        ("1.0", tmp_path / "c.png"),
    ]


def test_manifest_without_ids_makes_them_from_paths(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    root = tmp_path / "images"
    manifest.write_text(f"path\n./b/x.jpg\n{root}/a.png\n")
    sources = list_manifest(manifest, root)
    assert [(source.id, source.path) for source in sources] == [
        ("b/x", root / "b" / "x.jpg"),
        ("a", root / "a.png"),
    ]


def test_parquet_manifest(tmp_path: Path) -> None:
    frame = pd.DataFrame({"path": ["a.png", "b.png", "c.png"], "id": [3, 1, 2]})
    frame[frame["id"] < 3].to_parquet(tmp_path / "list.parquet")
    sources = list_manifest(tmp_path / "list.parquet")
    assert [(source.id, source.path.name) for source in sources] == [("1", "b.png"), ("2", "c.png")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,id\na.png,1\n", "needs a column 'path', its columns are: file, id"),
        ("path,id\n", "lists no image"),
        ("", "cannot be read as a table"),
        ("path\na,b.png\n", "more cells in a row than in its header"),
        ("path,id\na.png,1\n\nb.png\nc.png,3,4\n", "cannot be read as a table"),
        ("path,id\na.png,1\nb.png,\n", "column 'id' is empty in 1 rows, first in row 2"),
        ("path,id\na.png,1\n ,2\n", "column 'path' is empty in 1 rows, first in row 2"),
        ("path,id\na.png,1\nb.png,1\n", "have the same id '1'"),
        ("path\na.png\na.jpg\n", "have the same id 'a'"),
        ("path,id\na.png,1\n./a.png,2\n", "a.png twice"),
    ],
)
def test_bad_manifests(tmp_path: Path, text: str, message: str) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text(text)
    with pytest.raises(SourceError, match=message):
        list_manifest(manifest)


def test_manifest_that_is_missing_no_table_or_of_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "list.parquet").write_bytes(b"no parquet")
    (tmp_path / "latin.csv").write_bytes(b"path\ncaf\xe9.png\n")
    for name in ("none.csv", "list.parquet", "latin.csv"):
        with pytest.raises(SourceError, match="cannot be read as a table"):
            list_manifest(tmp_path / name)
    with pytest.raises(SourceError, match=r"a \.csv or \.parquet file"):
        list_manifest(tmp_path / "list.json")


def write_layout(root: Path, train: str, val: str, *images: str) -> Path:
    touch(*(root / "images" / name for name in images), root / "gt_sets" / "train.txt")
    (root / "gt_sets" / "train.txt").write_text(train)
    (root / "gt_sets" / "val.txt").write_text(val)
    return root


def test_layout_lists_train_then_val_and_ignores_other_images(tmp_path: Path) -> None:
    write_layout(tmp_path, "9\n 2 \n\n", "5\n", "2.png", "5.png", "9.jpg", "7.png")
    layout = list_layout(tmp_path)
    assert [source.id for source in layout.sources] == ["9", "2", "5"]
    assert layout.sources[0].path == tmp_path / "images" / "9.jpg"
    assert layout.splits == {"train": ("9", "2"), "val": ("5",)}


@pytest.mark.parametrize(
    ("train", "val", "images", "message"),
    [
        ("1\n", "2\n", ("1.png",), r"lacks 1 of 2 listed images \(ID.png or ID.jpg\): 2"),
        ("1\n", "\n", ("1.png",), "val.txt lists no image"),
        ("1\n1\n", "2\n", ("1.png", "2.png"), "repeats 1 ids: 1"),
        ("1\n2\n", "2\n", ("1.png", "2.png"), r"share 1 ids \(2\)"),
        ("1\n", "2\n", ("1.png", "2.png", "2.jpg"), "same id '2'"),
    ],
)
def test_bad_layouts(
    tmp_path: Path, train: str, val: str, images: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        list_layout(write_layout(tmp_path, train, val, *images))


def test_layout_without_lists_and_with_many_missing_images(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"train\.txt cannot be read.*one image id per line"):
        list_layout(tmp_path)
    ids = "".join(f"{number}\n" for number in range(12))
    with pytest.raises(SourceError, match=r"lacks 13 of 13.*: 0, 1, .*, 9, \.\.\.$"):
        list_layout(write_layout(tmp_path, ids, "v\n"))
