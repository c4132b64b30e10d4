"""WebDataset tars: stable ids, an index that follows the tars, and hostile members."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from stages.data import tars
from stages.data.config import DataConfig
from stages.data.dataset import open_dataset
from stages.data.images import decode_image, index_images
from stages.data.sources import ImageSource, SourceError
from stages.data.tars import expand_ranges, list_tars
from stages.progress import NoProgress


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def pack(members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars of two samples with captions, keys repeated between them."""
    for shard in range(2):
        samples = []
        for key in ("0000", "0001"):
            samples.append(member(f"{key}.png", picture(10 * shard + int(key))))
            samples.append(member(f"{key}.txt", b"a caption"))
        (tmp_path / f"train-{shard:03}.tar").write_bytes(pack(samples))
    return tmp_path


def listed(folder: Path, *shards: str) -> tuple[ImageSource, ...]:
    return list_tars([str(folder / shard) for shard in shards], folder / "index.parquet")


def values(sources: Sequence[ImageSource]) -> dict[str, int]:
    return {source.id: int(decode_image(source.path)[0, 0, 0]) for source in sources}


IDS = {"train-000/0000": 0, "train-000/0001": 1, "train-001/0000": 10, "train-001/0001": 11}


@pytest.mark.parametrize(
    "shards",
    [["*.tar"], ["train-{000..001}.tar"], ["train-001.tar", "train-000.tar"]],
    ids=["glob", "range", "reversed"],
)
def test_ids_and_order_do_not_depend_on_how_shards_are_named(
    folder: Path, shards: list[str]
) -> None:
    sources = listed(folder, *shards)
    assert values(sources) == IDS
    assert [source.id for source in sources] == list(IDS)


def test_remote_tars_are_read_in_parts(folder: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for tar in folder.glob("*.tar"):
        files.pipe(f"/shards/{tar.name}", tar.read_bytes())
    try:
        for shards in ("memory://shards/*.tar", "memory://shards/train-{000..001}.tar"):
            sources = list_tars([shards], tmp_path / "remote.parquet")
            assert values(sources) == IDS
    finally:
        files.rm("/shards", recursive=True)


def test_an_index_is_used_until_a_tar_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda tar: read.append(tar.name) or real(tar))
    listed(folder, "*.tar")
    assert sorted(read) == ["train-000.tar", "train-001.tar"]
    assert [source.id for source in listed(folder, "*.tar")] == list(IDS)
    assert len(read) == 2
    (folder / "train-001.tar").write_bytes(pack([member("new.png", picture(5))]))
    assert "train-001/new" in values(listed(folder, "*.tar"))
    assert read[2:] == ["train-001.tar"]
    (folder / "index.parquet").write_bytes(b"cut off")
    listed(folder, "*.tar")
    assert len(read) == 5
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.parquet", "train-000.tar", "train-001.tar",
    ]  # fmt: skip


def test_hostile_members_are_quarantined_and_nothing_is_unpacked(tmp_path: Path) -> None:
    good = picture(1)
    hostile = [
        member("good.png", good),
        member("../outside.png", good),
        member("/absolute.png", good),
        member("symlink.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hardlink.png", type=tarfile.LNKTYPE, linkname="good.png"),
        member("pipe.png", type=tarfile.FIFOTYPE),
        member("device.png", type=tarfile.CHRTYPE),
        member("empty.png"),
        member("folder.png", type=tarfile.DIRTYPE),  # no image at all
        member(".hidden.png", good),
    ]
    work = tmp_path / "work"
    work.mkdir()
    (work / "x.tar").write_bytes(pack(hostile))
    sources = list_tars([str(work / "x.tar")], work / "index.parquet")
    table = index_images(sources, 1.0, NoProgress())
    reasons = dict(zip(table.ids, table.statuses, strict=True))
    assert reasons == {
        "x/good": "ok",
        "x/../outside": "its name in the tar leads out of the tar",
        "x//absolute": "its name in the tar leads out of the tar",
        "x/symlink": "a link within the tar, not a file",
        "x/hardlink": "a link within the tar, not a file",
        "x/pipe": "not a regular file but a pipe or a device",
        "x/device": "not a regular file but a pipe or a device",
        "x/empty": "empty file (0 bytes)",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert sorted(path.name for path in work.iterdir()) == ["index.parquet", "x.tar"]


def test_a_huge_member_is_not_read(tmp_path: Path) -> None:
    info, _ = member("big.png", size=2**40)
    with (tmp_path / "x.tar").open("wb") as file:  # holes, so that it takes no room
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + 2**40 + 1024)
    source, *_ = list_tars([str(tmp_path / "x.tar")], tmp_path / "index.parquet")
    with pytest.raises(ValueError, match="more than 512 MiB"):
        decode_image(source.path)


def test_a_header_cannot_ask_for_memory(tmp_path: Path) -> None:
    info, _ = member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=2**40)
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + 2**40 + 1024)
    with pytest.raises(SourceError, match="cannot be listed as a tar"):
        listed(tmp_path, "x.tar")


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(1, 4608))
def test_a_tar_that_is_cut_off_is_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    whole = pack([member("a.png", picture(1)), member("b.png", picture(2))])
    content = whole.rstrip(b"\0")
    path = tmp_path_factory.mktemp("cut") / "x.tar"
    path.write_bytes(whole[: max(0, min(len(content) + 511, 2560) - cut % 2560)])
    with pytest.raises(SourceError, match=r"x\.tar (cannot be listed|has|is)|no tar holds"):
        list_tars([str(path)], path.with_name("index.parquet"))


@pytest.mark.parametrize("place", ["second header", "behind the end"])
def test_damage_that_hides_members_is_refused(folder: Path, place: str) -> None:
    path = folder / "train-000.tar"
    content = bytearray(path.read_bytes())
    if place == "second header":
        content[1024 : 1024 + 8] = b"\xff" * 8
    else:
        content += path.read_bytes()  # as `cat` joins tars
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"train-000\.tar (has a damaged header|goes on behind)"):
        listed(folder, "*.tar")


def test_compressed_missing_and_empty_tars_are_refused(folder: Path) -> None:
    with tarfile.open(folder / "x.tar", "w:gz") as archive:
        archive.addfile(*member("a.txt"))
    with pytest.raises(SourceError, match=r"compressed: .* unpack \.tar\.gz"):
        listed(folder, "x.tar")
    with pytest.raises(SourceError, match="No such file"):
        listed(folder, "none.tar")
    with pytest.raises(SourceError, match="no tar is called"):
        listed(folder, "none-*.tar")
    (folder / "x.tar").write_bytes(pack([member("a.txt", b"x")]))
    with pytest.raises(SourceError, match="no tar holds an image"):
        listed(folder, "x.tar")


def test_two_pictures_of_one_sample_need_a_choice(tmp_path: Path) -> None:
    both = [member("a.jpg.png", picture(2)), member("a.png", picture(1)), member("a.webp", b"")]
    (tmp_path / "x.tar").write_bytes(pack(both))
    with pytest.raises(SourceError, match=r"x\.tar:a\.webp have the same id 'x/a'"):
        listed(tmp_path, "x.tar")
    config = {"kind": "webdataset", "shards": [f"{tmp_path}/x.tar"], "suffixes": [".png"]}
    config["index"] = str(tmp_path / "index.parquet")
    data: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)
    dataset = open_dataset(data.validate_python(config))
    assert values(dataset.images) == {"x/a": 1}
    assert dataset.split("train") == ("x/a",)


def test_tars_of_one_name_in_two_folders_are_refused(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "train-000.tar").write_bytes((folder / "train-000.tar").read_bytes())
    with pytest.raises(SourceError, match="have the same id 'train-000/0000'"):
        listed(folder, "*.tar", "more/*.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{0..1}/{0..1}", ["0/0", "0/1", "1/0", "1/1"]),
        ("{3..1}", []),
    ],
)
def test_ranges(pattern: str, names: list[str]) -> None:
    assert list(expand_ranges(pattern)) == names


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.data.places._sleep", lambda seconds: None)
