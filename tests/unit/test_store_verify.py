"""Whatever happened to a store's files, `verify` says so, and `repair` has just that done again."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from store.calibration import Calibration, FittedTarget
from store.chunks import read_chunk, write_chunk
from store.errors import StoreError, StoreFormatError, StoreLockedError, UnfinishedStoreError
from store.findings import Finding, Verification
from store.layout import ArrayLayout
from store.reader import FeatureStore
from store.teacher import read_record
from store.testing import (
    file_contents,
    flip_bits,
    refuse_every_flip,
    sample_features,
    sample_images,
    sample_shard_bytes,
    sample_teacher,
    sample_views,
    write_rows,
    write_store,
)
from store.verify import repair, verify
from store.writer import FeatureWriter, create_store

SPEC = sample_teacher()
ROWS = 10
QUARANTINED = [2]
PER_SHARD = 4
SHARD_BYTES = sample_shard_bytes(SPEC, PER_SHARD)
DATA = "stage_1/native/c.{}.0.0.0"


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make(tmp_path / "store")
    return tmp_path / "store"


def make(path: Path) -> None:
    images = sample_images(ROWS, quarantined=QUARANTINED)
    write_store(path, images, SPEC, rows_per_shard=PER_SHARD)


def wrong(found: Verification) -> list[Finding]:
    return [finding for finding in found.findings if finding.severity != "remark"]


def only(found: Verification) -> Finding:
    assert len(wrong(found)) == 1, wrong(found)
    return wrong(found)[0]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def rewrite(folder: Path, layout: ArrayLayout, number: int, change: Callable[..., object]) -> None:
    """Change a chunk and give it the right checksum again."""
    values = read_chunk(folder, layout, number).copy()
    change(values)
    write_chunk(folder, layout, number, values)


def test_a_sound_store_is_clean_and_is_not_touched(path: Path) -> None:
    before = file_contents(path)
    found = verify(path)
    assert found.findings == []
    assert found.clean
    assert file_contents(path) == before
    assert ("small", "data") in found.performed
    shards = [data for name, data in before.items() if "native/c." in name or "global/c." in name]
    assert found.bytes_read == sum(map(len, shards))
    quick = verify(path, quick=True)
    assert quick.findings == []
    assert quick.bytes_read == 0
    assert ("small", "data") not in quick.performed


def test_every_flipped_bit_is_found_and_none_is_returned(tmp_path: Path) -> None:
    path = tmp_path / "store"
    write_store(path, sample_images(5, quarantined=QUARANTINED), SPEC, rows_per_shard=PER_SHARD)
    assert len(refuse_every_flip(path, path, 4)) >= 200
    assert verify(path).clean


def test_every_bit_of_a_shard_file_counts(path: Path) -> None:
    folder = path / "small" / "global"  # the smallest shards, alone
    for file, position in flip_bits(folder, 6, np.random.default_rng(2)):
        assert not verify(path).clean, (file, position)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("zarr.json", b'  "attributes"', b'\t "attributes"'),
        ("small/zarr.json", b'  "node_type"', b'\n "node_type"'),
        ("small/stage_1/native/zarr.json", b'"attributes": {}', b'"attributes":\t{}'),
        ("images/id/zarr.json", b'"zarr_format": 3', b'"zarr_format":\r3'),
    ],
)
def test_even_blanks_of_metadata_are_compared(
    path: Path, name: str, old: bytes, new: bytes
) -> None:
    data = (path / name).read_bytes()
    assert old in data
    (path / name).write_bytes(data.replace(old, new))
    finding = only(verify(path, quick=True))
    assert (finding.severity, finding.check) == ("suspect", "metadata")
    assert "not in the bytes that were written" in finding.what


def test_the_root_is_checked_beside_a_damaged_teacher(path: Path) -> None:
    (path / "zarr.json").write_bytes((path / "zarr.json").read_bytes() + b" ")
    (path / "small" / "zarr.json").write_bytes(b"{")
    places = [(entry.teacher, entry.severity) for entry in wrong(verify(path, quick=True))]
    assert places == [("small", "damage"), (None, "suspect")]


@pytest.mark.parametrize("name", ["small/zarr.json", "views/zarr.json", "small/valid/zarr.json"])
def test_attributes_that_somebody_added_are_found(path: Path, name: str) -> None:
    edit(path / name, lambda document: document["attributes"].update(note="mine"))
    assert only(verify(path, quick=True)).check == "metadata"


def test_consolidated_metadata_is_a_remark_until_it_is_stale(path: Path) -> None:
    with pytest.warns(UserWarning, match="Consolidated metadata"):
        zarr.consolidate_metadata(path)
    found = verify(path)
    assert found.clean
    assert [entry.what for entry in found.findings] == [
        "another tool added consolidated metadata to the root"
    ]
    with FeatureWriter.open(path, sample_teacher("second"), SHARD_BYTES) as writer:
        write_rows(writer, sample_teacher("second"), range(4, 8))
    finding = only(verify(path))
    assert "stale" in finding.what
    assert "'second'" in finding.what


@pytest.mark.parametrize("damage", ["remove", "shorten", "lengthen"])
@pytest.mark.parametrize("quick", [False, True])
def test_lost_and_torn_files_are_found_without_reading_them(
    path: Path, damage: str, quick: bool
) -> None:
    file = path / "small" / DATA.format(1)
    if damage == "remove":
        file.unlink()
    elif damage == "shorten":
        os.truncate(file, 100)
    else:
        file.write_bytes(file.read_bytes() + b"x")
    finding = only(verify(path, quick=quick))
    assert (finding.check, finding.teacher, finding.level, finding.shard) == (
        "files", "small", "stage_1/native", 1,
    )  # fmt: skip
    assert finding.what.startswith(str(file))


def test_a_damaged_row_is_named_with_its_image(path: Path) -> None:
    file = path / "small" / DATA.format(1)
    data = bytearray(file.read_bytes())
    data[(3 * 4 * 6 * 2 + 4) * 2 + 7] ^= 1  # third row of the second shard
    file.write_bytes(data)
    by_row = [finding for finding in wrong(verify(path)) if finding.row is not None]
    assert [(entry.level, entry.shard, entry.row, entry.image) for entry in by_row] == [
        ("stage_1/native", 1, 6, "room/0006-é")
    ]
    assert by_row[0].where() == "small, stage_1/native, shard 1, row 6, image room/0006-é"


def test_exchanged_shards_are_found(path: Path) -> None:
    one, other = (path / "small" / DATA.format(shard) for shard in (0, 1))
    spare = path.parent / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    found = wrong(verify(path))
    assert {entry.shard for entry in found if "digest" in entry.what} == {0, 1}
    assert all(entry.level == "stage_1/native" for entry in found)
    assert verify(path, quick=True).clean  # what quick means


def test_exchanged_shards_are_found_even_with_their_digests(path: Path) -> None:
    """The statistics of the commit record tell whose features they are."""
    test_exchanged_shards_are_found(path)
    layout = read_record(path / "small").layout
    digests = [read_chunk(path / "small", layout.digests(), shard).copy() for shard in (0, 1)]
    digests[0][0, 0], digests[1][0, 0] = digests[1][0, 0].copy(), digests[0][0, 0].copy()
    for shard, values in enumerate(digests):
        write_chunk(path / "small", layout.digests(), shard, values)
    found = wrong(verify(path))
    assert {entry.shard for entry in found if entry.check == "statistics"} == {0, 1}
    assert {entry.shard for entry in found if "digest" in entry.what} == {0, 1}  # has the number


@pytest.mark.parametrize(
    "copy", ["small/stage_1/native/c.7.0.0.0", "small/extra.bin", "images/id/c.9.0", "notes.txt"]
)
def test_files_that_do_not_belong_are_reported(path: Path, copy: str) -> None:
    shutil.copy(path / "small" / DATA.format(0), path / copy)
    finding = only(verify(path, quick=True))
    assert (finding.severity, finding.check) == ("suspect", "files")
    assert copy in finding.what


def test_dot_files_are_left_alone_and_partials_are_remarked(path: Path) -> None:
    (path / ".gitignore").write_text("/small\n")
    (path / "small" / ".keep").write_text("")
    (path / "small" / "stage_1" / "native" / ".c.0.0.0.0.partial").write_text("half")
    found = verify(path, quick=True)
    assert found.clean
    remark = found.findings[0]
    assert len(found.findings) == 1
    assert "sak gc" in remark.mend


def test_a_folder_that_lost_its_description_is_damage(path: Path) -> None:
    (path / "small" / "zarr.json").unlink()
    assert only(verify(path)).what.endswith(
        "looks like a teacher, but its zarr.json does not say so"
    )


def test_a_stale_commit_mark_is_found(path: Path) -> None:
    """The mark vouches for files of another extraction, of the same shape and size."""
    other = sample_teacher("other")
    with FeatureWriter.open(path, other, SHARD_BYTES) as writer:
        for rows in writer.missing():
            shifted = range(rows.start + 1, rows.stop + 1)
            features = sample_features(other, shifted)
            pooled = features.pop("global")
            good = np.array([row not in QUARANTINED for row in rows])
            writer.write(rows, features, pooled, good)
        writer.finish()
    assert verify(path).clean
    for level in ("stage_1/native/c.1.0.0.0", "stage_2/native/c.1.0.0.0", "global/c.1.0"):
        shutil.copy(path / "other" / level, path / "small" / level)
    found = verify(path)
    assert {entry.shard for entry in wrong(found)} == {1}
    assert sum("digest" in entry.what for entry in wrong(found)) == 3


def test_marks_must_agree_with_the_image_table(path: Path) -> None:
    folder, layout = path / "small", read_record(path / "small").layout

    def swap(marks: np.ndarray) -> None:
        marks[1], marks[2] = 2, 1

    rewrite(folder, layout.valid(), 0, swap)
    found = wrong(verify(path))
    by_mark = [(entry.row, entry.what) for entry in found if entry.check == "commits"]
    assert [row for row, _ in by_mark] == [1, 2]
    assert "marked quarantined, the image table lists its image as usable" in by_mark[0][1]
    not_zero = [entry for entry in found if "not zero" in entry.what]
    assert {(entry.level, entry.row) for entry in not_zero} == {
        ("stage_1/native", 1), ("stage_2/native", 1), ("global", 1),
    }  # fmt: skip
    assert any(entry.check == "statistics" for entry in found)


@pytest.mark.parametrize("mark", [0, 3])
def test_marks_of_a_committed_shard_must_be_known(path: Path, mark: int) -> None:
    layout = read_record(path / "small").layout
    rewrite(path / "small", layout.valid(), 1, lambda marks: marks.__setitem__(0, mark))
    finding = only(verify(path))
    assert (finding.check, finding.shard) == ("commits", 1)


@pytest.mark.parametrize("part", ["mean", "variance", "count"])
def test_edited_statistics_are_found_to_the_last_bit(path: Path, part: str) -> None:
    layout = read_record(path / "small").layout.statistics(SPEC.targets[1])[part]

    def nudge(values: np.ndarray) -> None:
        values[...] = values + 1 if part == "count" else np.nextafter(values, np.inf)

    rewrite(path / "small", layout, 0, nudge)
    finding = only(verify(path, quick=True))
    assert (finding.check, finding.level) == ("statistics", "stage_2/native")
    assert part in finding.what


@pytest.mark.parametrize("channel", [0, 5])
@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize(
    ("factor", "severity"),
    [(1 + 1e-3, "damage"), (np.inf, "damage"), (np.nan, "damage"), (1 + 1e-9, "remark")],
)
def test_edited_commit_statistics_are_found(
    path: Path, factor: float, severity: str, part: int, channel: int
) -> None:
    layout = read_record(path / "small").layout

    def scale(values: np.ndarray) -> None:
        values[0, part, channel] *= factor

    rewrite(path / "small", layout.moments(), 1, scale)
    found = [entry for entry in verify(path).findings if entry.shard == 1]
    assert [(entry.severity, entry.check, entry.level) for entry in found] == [
        (severity, "statistics", "stage_1/native")
    ]


@pytest.mark.parametrize("codec", ["float16", "int8", "pca-4bit"])
def test_a_strong_channel_hides_no_other(codec: str, tmp_path: Path) -> None:
    """As teachers with massive activations have them: one channel a thousand times the others."""
    spec = sample_teacher(codec=codec)
    create_store(tmp_path / "store", sample_images(8), sample_views(8))
    features = sample_features(spec, range(8))
    pooled = features["global"]
    levels = {name: features[name] for name in ("stage_1", "stage_2")}
    for level in levels.values():
        level[..., 0] *= 1000

    def calibrate() -> dict[str, FittedTarget]:
        calibration = Calibration(spec, 8)
        for row in range(8):
            calibration.add({key: value[row] for key, value in levels.items()}, held_out=row == 1)
        return calibration.fit(spec.codec)

    with FeatureWriter.open(tmp_path / "store", spec, calibrate=calibrate) as writer:
        writer.write(range(8), levels, pooled, np.ones(8, bool))
        writer.finish()
    assert "statistics" not in {entry.check for entry in verify(tmp_path / "store").findings}
    layout = read_record(tmp_path / "store/small").layout
    record = (tmp_path / "store/small" / layout.moments().file_path(0)).read_bytes()
    for part, change in ((1, 0.1), (2, 0.2)):
        (tmp_path / "store/small" / layout.moments().file_path(0)).write_bytes(record)

        def edit(values: np.ndarray, part: int = part, change: float = change) -> None:
            deviation = np.sqrt(values[0, 2, 3] / values[0, 0, 3])
            values[0, part, 3] += change * (deviation if part == 1 else values[0, 2, 3])

        rewrite(tmp_path / "store/small", layout.moments(), 0, edit)
        found = wrong(verify(tmp_path / "store"))
        assert "statistics" in {entry.check for entry in found}


def test_shards_exchanged_with_all_their_records_are_found(path: Path) -> None:
    for one in (path / "small").rglob("c.0*"):
        other = one.with_name("c.1" + one.name.removeprefix("c.0"))
        if other.exists():
            spare = one.with_name("spare")
            one.rename(spare)
            other.rename(one)
            spare.rename(other)
    found = wrong(verify(path))
    assert {entry.shard for entry in found if "digest" in entry.what} == {0, 1}


@pytest.mark.parametrize("column", ["id", "sha256", "status"])
def test_an_edited_image_table_is_found(path: Path, column: str) -> None:
    other = sample_images(ROWS, quarantined=[3])
    other = replace(other, ids=tuple(name.replace("room", "hall") for name in other.ids))
    other = replace(other, sha256=tuple("f" * 64 for _ in other.sha256))
    create_store(path.parent / "other", other, sample_views(ROWS))
    shutil.rmtree(path / "images" / column)
    shutil.copytree(path.parent / "other" / "images" / column, path / "images" / column)
    finding = next(entry for entry in wrong(verify(path)) if entry.check == "tables")
    assert "does not have the digest recorded at the root" in finding.what
    assert "sak index" in finding.mend


def test_a_teacher_of_other_images_is_damage(path: Path) -> None:
    for name in ("images", "views"):
        shutil.rmtree(path / name)
    (path / "zarr.json").unlink()
    create_store(path, sample_images(ROWS), sample_views(ROWS))
    finding = only(verify(path))
    assert "extracted for other images" in finding.what


@pytest.mark.parametrize("name", ["zarr.json", "small/zarr.json"])
@pytest.mark.parametrize("key", ["rows", "images", "views_per_image", "rows_per_shard"])
def test_huge_numbers_are_damage_and_cost_nothing(path: Path, name: str, key: str) -> None:
    edit(path / name, lambda document: document["attributes"].update({key: 10**15}))
    assert not verify(path).clean


def test_all_damage_is_reported_at_once(path: Path) -> None:
    for shard in (0, 2):
        (path / "small" / DATA.format(shard)).unlink()
    (path / "views" / "flip" / "c.0").unlink()
    edit(path / "small" / "valid" / "zarr.json", lambda document: document.update(shape=[1]))
    found = verify(path)
    assert {(entry.teacher, entry.check, entry.shard) for entry in wrong(found)} == {
        ("small", "files", 0), ("small", "files", 2), (None, "tables", None),
        ("small", "metadata", None),
    }  # fmt: skip
    assert all(entry.mend for entry in wrong(found))


def test_unfinished_teachers_are_verified_as_far_as_they_are(tmp_path: Path) -> None:
    create_store(tmp_path, sample_images(ROWS), sample_views(ROWS))
    with FeatureWriter.open(tmp_path, SPEC, SHARD_BYTES) as writer:
        write_rows(writer, SPEC, range(4, 8))
    found = verify(tmp_path)
    assert found.clean
    assert [entry.what for entry in found.findings] == [
        "it is not finished: 2 of 3 shards are missing"
    ]
    (tmp_path / "small" / DATA.format(1)).unlink()
    assert only(verify(tmp_path)).shard == 1


def test_only_the_teachers_asked_for_are_read(path: Path) -> None:
    with FeatureWriter.open(path, sample_teacher("second"), SHARD_BYTES):
        pass
    (path / "small" / DATA.format(1)).unlink()
    assert verify(path, ["second"]).clean
    assert not verify(path, ["small"]).clean
    with pytest.raises(StoreError, match="did you mean 'small'"):
        verify(path, ["smal"])


def test_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no feature store"):
        verify(tmp_path / "nowhere")
    with pytest.raises(StoreFormatError):
        verify(tmp_path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "row": lambda folder: flip(folder / DATA.format(1), 50),
    "index": lambda folder: flip(folder / DATA.format(1), -10),
    "digest": lambda folder: flip(folder / "commit/digest/c.1.0.0", 5),
    "moments": lambda folder: flip(folder / "commit/statistics/c.1.0.0", 5),
    "mark": lambda folder: flip(folder / "valid/c.1", 1),
}


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 8
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_has_just_the_damaged_shard_computed_again(path: Path, damage: str) -> None:
    whole = file_contents(path)
    DAMAGES[damage](path / "small")
    before = file_contents(path)
    done = repair(path, verify(path))
    assert done == ["small: shards 1 will be computed again by `sak extract-teachers small`"]
    after = file_contents(path)
    assert {name for name in before if before[name] != after.get(name)} == {
        "small/valid/c.1", "small/zarr.json",
    }  # fmt: skip
    with pytest.raises(UnfinishedStoreError):
        FeatureStore(path).read("small", "stage_1", [0])
    good = np.array([row not in QUARANTINED for row in range(ROWS)])
    with FeatureWriter.open(path, SPEC) as writer:
        assert writer.missing() == [range(4, 8)]
        write_rows(writer, SPEC, range(4, 8), good)
        writer.finish()
    assert file_contents(path) == whole
    assert verify(path).clean


def test_repair_of_statistics_reads_no_features_again(path: Path) -> None:
    whole = file_contents(path)
    flip(path / "small" / "stage_1" / "stats" / "native" / "mean" / "c.0", 3)
    assert repair(path, verify(path, quick=True))
    with FeatureWriter.open(path, SPEC) as writer:
        assert writer.missing() == []
        writer.finish()
    assert file_contents(path) == whole


def test_a_repair_that_is_killed_half_way_leaves_a_store_that_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(path / "small" / DATA.format(1), 50)
    found = verify(path)
    monkeypatch.setattr("store.verify.write_record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        repair(path, found)
    with pytest.raises(StoreError):
        FeatureStore(path).read("small", "stage_1", [0])
    with FeatureWriter.open(path, SPEC) as writer:
        assert writer.missing() == [range(4, 8)]


def test_repair_touches_nothing_sound_and_waits_for_writers(path: Path) -> None:
    before = file_contents(path)
    assert repair(path, verify(path)) == []
    assert file_contents(path) == before
    flip(path / "small" / DATA.format(1), 50)
    found = verify(path)
    with FeatureWriter.open(path, SPEC), pytest.raises(StoreLockedError):
        repair(path, found)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 9),
    per_shard=st.integers(1, 5),
    views=st.integers(1, 2),
    quarantined=st.sets(st.integers(1, 8)),
    pooled=st.booleans(),
)
def test_whatever_is_written_verifies(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    per_shard: int,
    views: int,
    quarantined: set[int],
    pooled: bool,
) -> None:
    path = tmp_path_factory.mktemp("any") / "store"
    spec = sample_teacher(global_channels=3 if pooled else None)
    images = sample_images(rows, quarantined=sorted(quarantined))
    write_store(path, images, spec, rows_per_shard=per_shard, views_per_image=views)
    assert verify(path).clean


def test_findings_are_plain_json(path: Path) -> None:
    (path / "small" / DATA.format(1)).unlink()
    data = json.loads(json.dumps(verify(path).to_json()))
    assert data["clean"] is False
    assert data["checks"]["small"]["files"] == 1
    assert data["checks"]["store"] == {"metadata": 0, "files": 0, "tables": 0}
    assert data["findings"][0]["shard"] == 1
    assert {entry["level"] for entry in data["features"]} == {
        "stage_1/native",
        "stage_2/native",
        "global",
    }
