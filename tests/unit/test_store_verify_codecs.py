"""`verify` of coded features at several resolutions, and of stores on object storage."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from store.chunks import read_chunk, write_chunk
from store.codecs import Int8Codec
from store.errors import UnfinishedStoreError
from store.findings import Finding, Verification
from store.reader import FeatureStore
from store.remote import locate
from store.teacher import read_record
from store.testing import (
    read_everything,
    refuse_every_flip,
    sample_codecs,
    sample_images,
    sample_teacher,
    sample_views,
    write_rows,
    write_store,
)
from store.verify import repair, verify
from store.writer import FeatureWriter, create_store

ROWS = 9
QUARANTINED = [2]
GRIDS = ((3, 4), (2, 2))
TARGETS = {"stage_1/native", "stage_1/2x2", "stage_2/native", "global"}
CODES = "small/stage_1/2x2/c.{}.0.0.0"


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make(tmp_path / "store", "int8")
    return tmp_path / "store"


def make(path: Path | str, codec: str, rows: int = ROWS) -> None:
    spec = sample_teacher(codec=codec, stored=GRIDS)
    write_store(path, sample_images(rows, quarantined=QUARANTINED), spec, covariance=True)


def wrong(found: Verification) -> list[Finding]:
    return [finding for finding in found.findings if finding.severity != "remark"]


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 8
    file.write_bytes(data)


@pytest.mark.parametrize("codec", ["float32", "int8", "int8-pca", "int8-pca4", "pca-4bit"])
def test_a_sound_store_is_clean_at_every_resolution(tmp_path: Path, codec: str) -> None:
    make(tmp_path / "store", codec)
    found = verify(tmp_path / "store")
    assert wrong(found) == []
    assert not any(entry.check == "statistics" for entry in found.findings)  # equal to the bit
    assert {one.level for one in found.numbers} == TARGETS
    assert {one.rows for one in found.numbers} == {ROWS - len(QUARANTINED)}
    assert (("small", "codecs") in found.performed) == (codec != "float32")


@pytest.mark.parametrize(
    ("codec", "below"), [("int8", "small/stage_1"), ("pca-4bit", "small/stage_1/codec")]
)
def test_every_flipped_bit_is_found_and_none_is_returned(
    tmp_path: Path, codec: str, below: str
) -> None:
    path = tmp_path / "store"
    make(path, codec, rows=5)
    flipped = refuse_every_flip(path, path / below, 1)
    for part in ("codec/2x2/fidelity/c.0", "codec/native/fidelity/zarr.json"):
        assert f"small/stage_1/{part}" in flipped


@pytest.mark.parametrize("name", ["scale/c.0", "offset/c.0", "fidelity/c.0"])
def test_a_damaged_codec_is_named_and_its_features_are_not_judged(path: Path, name: str) -> None:
    file = path / "small/stage_1/codec/2x2" / name
    flip(file, 1)
    found = verify(path)
    places = [(entry.severity, entry.check, entry.level) for entry in wrong(found)]
    assert places == [("damage", "codecs", "stage_1/2x2")]
    assert str(file) in wrong(found)[0].what
    assert "sak extract-teachers small" in wrong(found)[0].mend
    assert {one.level for one in found.numbers} == TARGETS - {"stage_1/2x2"}
    assert wrong(verify(path, quick=True)) == wrong(found)
    assert repair(path, found) == []


def test_parameters_that_were_exchanged_are_found_though_their_checksums_are_right(
    path: Path,
) -> None:
    folder = path / "small" / "stage_1" / "codec"
    other, mine = folder / "native" / "offset" / "c.0", folder / "2x2" / "offset" / "c.0"
    assert other.read_bytes() != mine.read_bytes()
    mine.write_bytes(other.read_bytes())
    findings = wrong(verify(path))
    assert [(entry.check, entry.level) for entry in findings] == [("codecs", "stage_1/2x2")]
    assert "does not have the digest" in findings[0].what


@pytest.mark.parametrize("codec", ["int8", "int8-pca", "pca-4bit"])
def test_codes_of_other_rows_are_told_by_their_statistics(tmp_path: Path, codec: str) -> None:
    """Exchanged shards, with their digests, so that every checksum is right."""
    path = tmp_path / "store"
    make(path, codec)
    layout = read_record(path / "small").layout
    first, second = ((path / CODES.format(shard)).read_bytes() for shard in (0, 1))
    (path / CODES.format(0)).write_bytes(second)
    (path / CODES.format(1)).write_bytes(first)
    number = list(layout.features()).index("stage_1/2x2")
    digests = [read_chunk(path / "small", layout.digests(), shard).copy() for shard in (0, 1)]
    for shard, data in enumerate((second, first)):
        digests[shard][0, number] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        write_chunk(path / "small", layout.digests(), shard, digests[shard])
    judged = [entry for entry in wrong(verify(path)) if "statistics" in entry.what]
    assert {(entry.level, entry.shard) for entry in judged} == {
        ("stage_1/2x2", 0), ("stage_1/2x2", 1),
    }  # fmt: skip
    assert {entry.check for entry in judged} == {"statistics"}


@pytest.mark.parametrize(("factor", "severity"), [(1 + 1e-4, "damage"), (1 + 1e-9, "remark")])
def test_edited_covariances_are_found(path: Path, factor: float, severity: str) -> None:
    layout = read_record(path / "small").layout
    line = read_chunk(path / "small", layout.comoments(), 1) * factor
    write_chunk(path / "small", layout.comoments(), 1, line)
    found = [entry for entry in verify(path).findings if entry.shard == 1]
    assert {(entry.severity, entry.check, entry.level) for entry in found} == {
        (severity, "statistics", target) for target in TARGETS - {"global"}
    }
    flip(path / "small/stage_2/stats/native/covariance/c.0.0", 3)
    assert any("covariance" in entry.what for entry in wrong(verify(path, quick=True)))


@pytest.mark.parametrize(("factor", "severity"), [(1.0, None), (0.3, "suspect")])
def test_many_clipped_codes_are_a_finding_and_a_few_are_not(
    tmp_path: Path, factor: float, severity: str | None
) -> None:
    spec = sample_teacher(codec="int8", stored=GRIDS)
    fitted = sample_codecs(spec, 64)
    for name, one in fitted.items():
        assert isinstance(one.codec, Int8Codec)
        codec = replace(one.codec, scale=one.codec.scale * np.float32(factor))
        fitted[name] = replace(one, codec=codec)
    create_store(tmp_path, sample_images(ROWS), sample_views(ROWS))
    with FeatureWriter.open(tmp_path, spec, calibrate=lambda: fitted) as writer:
        write_rows(writer, spec, range(ROWS))
        writer.finish()
    found = verify(tmp_path)
    assert {entry.severity for entry in wrong(found)} == ({severity} if severity else set())
    clipped = [entry for entry in found.findings if "at the limit of the stored type" in entry.what]
    assert len(clipped) == 3 or severity is None
    for one in found.numbers:
        assert one.stored_values > 0


@pytest.fixture
def url() -> Iterator[str]:
    yield f"memory://{uuid.uuid4().hex}/store.zarr"
    MemoryFileSystem.store.clear()


def test_a_store_on_object_storage_is_verified_alike(url: str, path: Path) -> None:
    make(url, "int8")
    near, far = verify(path), verify(url)
    assert wrong(far) == []
    assert far.bytes_read == near.bytes_read
    assert [replace(one, megabytes_per_second=0.0) for one in far.numbers] == [
        replace(one, megabytes_per_second=0.0) for one in near.numbers
    ]
    (locate(url) / "small" / "notes.txt").write_bytes(b"mine")
    assert "notes.txt" in wrong(verify(url, quick=True))[0].what


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove"])
def test_damage_on_object_storage_is_found_and_mended(url: str, damage: str) -> None:
    make(url, "int8")
    whole = read_everything(url)
    file = locate(url) / CODES.format(1)
    data = bytearray(file.read_bytes())
    data[30] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(bytes(data[:-1] if damage == "shorten" else data))
    found = verify(url)
    assert {(entry.level, entry.shard) for entry in wrong(found)} == {("stage_1/2x2", 1)}
    assert str(file) in wrong(found)[0].what
    assert "/sak-verify-" not in "".join(entry.what for entry in found.findings)
    assert len(repair(url, found)) == 1
    with pytest.raises(UnfinishedStoreError):
        FeatureStore(url).read("small", "stage_1", [0])
    spec = sample_teacher(codec="int8", stored=GRIDS)
    good = np.array([row not in QUARANTINED for row in range(ROWS)])
    with FeatureWriter.open(url, spec, covariance=True) as writer:
        assert writer.missing() == [range(4, 8)]
        write_rows(writer, spec, range(4, 8), good)
        writer.finish()
    assert wrong(verify(url)) == []
    for name, values in read_everything(url).items():
        np.testing.assert_array_equal(values, whole[name])
